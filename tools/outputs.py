"Run all notebooks and store their outputs: `python tools/outputs.py [notebook or folder]`"
import json
import os
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def run(what:Path):
    "Run notebooks, which keep their outputs; exit if one fails"
    env = {**os.environ, 'MPLBACKEND':'module://matplotlib_inline.backend_inline', 'PYTHONWARNINGS':'ignore',
           'MATPLOTLIBRC':str(root/'tools/matplotlibrc')}
    res = subprocess.run(['nbdev-test', str(what), '--save', '--n-workers', '2'], cwd=root, env=env)
    if res.returncode: sys.exit(res.returncode)

def as_shown(text) -> str:
    "What a terminal shows at the end: progress bars overwrite themselves"
    lines = ''.join(text).split('\n')
    return '\n'.join(l.rstrip('\r').rpartition('\r')[2].rstrip() if '\r' in l else l for l in lines).lstrip('█')

def is_empty(output:dict) -> bool: return output['output_type'] == 'stream' and not ''.join(output['text']).strip()

def tidy(cell:dict):
    "Leave of a cell's text what a terminal shows in the end, if anything"
    for o in cell.get('outputs', []):
        if o['output_type'] == 'stream': o['text'] = as_shown(o['text']).splitlines(keepends=True)
    if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if not is_empty(o)]

def main(what:Path):
    run(what)
    for f in sorted(what.rglob('*.ipynb')) if what.is_dir() else [what]:
        nb = json.loads(f.read_text(encoding='utf-8'))
        for cell in nb['cells']: tidy(cell)
        f.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    subprocess.run(['nbdev-clean'], cwd=root, check=True)

if __name__ == '__main__': main(Path(sys.argv[1] if sys.argv[1:] else root/'nbs'))
