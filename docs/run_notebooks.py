"""Run the notebooks of examples/ in folders of their own: `python docs/run_notebooks.py [--keep]`.

An error in a cell ends with its traceback. `--keep` writes the text that they print into the files,
for the pages of the site; pictures are left out.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 600


def text_alone(cell):
    """The outputs of a cell without pictures and without what warns."""
    return [
        output
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    ]


def main():
    """Run each notebook; say how long it took."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for file in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": folder}}
            )
            client.execute()
        print(f"{file.name}: {time.monotonic() - start:.0f} s", flush=True)
        if "--keep" not in sys.argv:
            continue
        for cell in notebook.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = text_alone(cell), None
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
