"""Calls /admin of the worker in this pod: `python -m tandem_cli.admin_call URL TOKEN_FILE [BODY]`.

With a body it is a POST, else a GET. Runs inside of a worker's container, so that its token never
leaves the pod. Prints the answer.
"""

import sys
from pathlib import Path

import httpx

CALL_SECONDS = 90.0


def main() -> None:
    """Print what the worker answers, errors too; code 1 if there is no answer."""
    url, token_file, *body = sys.argv[1:]
    token = Path(token_file).read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        with httpx.Client(trust_env=False, timeout=CALL_SECONDS) as client:
            if body:
                answer = client.post(url, content=body[0], headers=headers)
            else:
                answer = client.get(url, headers=headers)
    except httpx.HTTPError as error:
        sys.exit(f"the worker does not answer at {url}: {error!r}")
    print(answer.text)


if __name__ == "__main__":
    main()
