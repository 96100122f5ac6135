"""Lets the programs of this folder import each other as `train.x`, as the rest of the project does.

`python train/train.py` puts the folder train/ first on the path, where `import train` would find train.py. A
package is found before a module, so it finds this one instead, whose submodules are the folder's files.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent.parent)]
