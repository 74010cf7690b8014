"""A local server that speaks the endpoints of the hub that timm and huggingface_hub use.

Repositories, LFS uploads, commits, and files by `resolve`; not Xet, datasets or branches. Real
clients reach it by `HF_ENDPOINT`, set before huggingface_hub is imported, with
`HF_HUB_DISABLE_XET=1`. Everything lies in memory: `HubServer.files[repo][path]`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_test"
COMMIT = "1" * 40


class HubServer:
    """Run in a thread as a context manager. Commits to `.../failing` fail; `PUT /stop` ends it.

    Of every repository `private` says what was asked when it was made; `uploads` are the files that
    were sent, each content once as on the hub.
    """

    def __init__(self):
        self.files, self.lfs = {}, {}
        self.private, self.uploads = {}, []
        self.busy = 0  # so many requests of files are put off
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self):
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()

    def __exit__(self, *_):
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _resolve(self):
        parts = urlsplit(self.path).path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            return self._answer(404, {"error": "not found"})
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo not in self.hub.files:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound")
        if self.hub.busy:
            self.hub.busy -= 1
            return self._answer(503)
        data = self.hub.files[repo].get(name)
        if data is None:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self._answer(200, data, ETag=etag, X_Repo_Commit=COMMIT)

    do_GET = do_HEAD = _resolve  # noqa: N815

    def do_PUT(self):
        if self.path == "/stop":
            self._answer(200)
            threading.Thread(target=self.hub.stop).start()
            return
        self.hub.uploads.append(self.path)
        self.hub.lfs[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self):
        body = self._body()
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body)["objects"])
        if path.endswith("/commit/main"):
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": f"no {path}"})

    def _create(self, wanted):
        repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        exists = repo in self.hub.files
        self.hub.private.setdefault(repo, wanted.get("private") or wanted.get("visibility"))
        self.hub.files.setdefault(repo, {})
        self._answer(409 if exists else 200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _lfs_batch(self, objects):
        answers = []
        for o in objects:
            answers.append({"oid": o["oid"], "size": o["size"]})
            if o["oid"] not in self.hub.lfs:  # else it is there already: nothing to do
                href = f"{self.hub.url}/lfs/{o['oid']}"
                answers[-1]["actions"] = {"upload": {"href": href, "header": {}}}
        self._answer(200, {"transfer": "basic", "objects": answers})

    def _commit(self, repo, operations):
        if repo.endswith("/failing"):
            return self._answer(500, {"error": "out of order"})
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.lfs[value["oid"]]
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        return self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
