"README.md from nbs/index.ipynb, and the project's address, which stands in pyproject.toml alone"
import json
from pathlib import Path

try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10, where nbdev needs it, too

from nb2md import convert

root = Path(__file__).resolve().parent.parent

def read(name:str) -> str: return (root/name).read_text(encoding='utf-8')

def project_url(name:str) -> str:
    "Find an address of `[project.urls]`, without a slash at its end; '' if the project has none yet"
    return tomllib.loads(read('pyproject.toml'))['project']['urls'].get(name, '').rstrip('/')

def doc_url() -> str:
    "Find the address of the site"
    return project_url('Documentation')

def readme() -> str:
    "Make README.md of the first page"
    return convert(json.loads(read('nbs/index.ipynb')), site=False, doc_url=doc_url())[0]

def write(): (root/'README.md').write_text(readme(), encoding='utf-8')

if __name__ == '__main__': write()
