"Run all notebooks and store their outputs: `python tools/outputs.py [notebook or folder]`"
import json, os, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
what = Path(sys.argv[1] if sys.argv[1:] else root/'nbs')

env = {**os.environ, 'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'PYTHONWARNINGS': 'ignore'}
res = subprocess.run(['nbdev-test', str(what), '--save', '--n-workers', '2'], cwd=root, env=env)
if res.returncode: sys.exit(res.returncode)

def as_shown(text):
    "What a terminal shows at the end: progress bars overwrite themselves"
    lines = ''.join(text).split('\n')
    return '\n'.join(l.rstrip('\r').rpartition('\r')[2].rstrip() if '\r' in l else l for l in lines).lstrip('█')

for f in sorted(what.rglob('*.ipynb')) if what.is_dir() else [what]:
    nb = json.loads(f.read_text(encoding='utf-8'))
    for c in nb['cells']:
        for o in c.get('outputs', []):
            if o['output_type']=='stream': o['text'] = as_shown(o['text']).splitlines(keepends=True)
        if 'outputs' in c: c['outputs'] = [o for o in c['outputs'] if o['output_type']!='stream' or ''.join(o['text']).strip()]
    f.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
subprocess.run(['nbdev-clean'], cwd=root, check=True)
