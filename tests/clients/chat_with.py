"""`transformers chat`, two turns in a pipe, with the model that is served at an address."""

import json
import os
import subprocess
import sys

name, address = sys.argv[1:]
command = [sys.executable, "-I", "-m", "transformers.cli.transformers", "chat", name, address]
online = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline its client of the protocol refuses every address
asked = "What is an oak?\nn\nAnd a beech?\nn\n!exit\n"  # n: the answer stopped at 8 tokens, and shall not go on
drawn = ["do_sample=False", "max_new_tokens=8"]
done = subprocess.run([*command, *drawn], input=asked, capture_output=True, text=True, env=online)
print(json.dumps({"status": done.returncode, "said": done.stdout, "errors": done.stderr[-2000:]}))
