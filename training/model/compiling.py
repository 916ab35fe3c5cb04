"""torch.compile, once: of each block in place, or by Accelerate of the whole model."""

import os

from ..system.errors import UserError


def plan_compilation(args) -> dict | None:
    """What each block's `compile` is to be given, or None; then `args` leave nothing to Accelerate.

    `torch_compile_mode` and `torch_compile_backend` ask for compilation too, as in transformers.
    """
    mode, backend = args.torch_compile_mode, args.torch_compile_backend
    args.torch_compile = bool(args.torch_compile or mode or backend)
    if not args.torch_compile or args.compile_scope == "model":
        return None
    launcher = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if launcher != "no":
        raise UserError(
            f"torch_compile: accelerate launch compiles the whole model already (dynamo_backend={launcher}); "
            "leave it out there, or take --compile_scope model"
        )
    args.torch_compile, args.torch_compile_mode, args.torch_compile_backend = False, None, None
    return {"backend": backend or "inductor", "mode": mode}
