"""`transformers serve`, asked to go on with a text by the model directory that it is given: does it, or why not?"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
command = [sys.executable, "-I", "-m", "transformers.cli.transformers", "serve", "--port", port, "--trust-remote-code"]
errors = Path("errors.txt")
with errors.open("w") as file:
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=file)
body = json.dumps({"model": sys.argv[1], "prompt": "the quick", "max_tokens": 4}).encode()
request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
try:
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                facts = {"status": answer.status, "text": answer.read().decode()}
            break
        except urllib.error.HTTPError as error:
            facts = {"status": error.code, "text": error.read().decode()}
            break
        except urllib.error.URLError:
            time.sleep(1)
finally:
    server.terminate()
    server.wait(30)
print(json.dumps({**facts, "errors": errors.read_text()}))
