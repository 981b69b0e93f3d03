"""Files for GitHub and for citing are valid, and workflows run nothing but steps of .ci/run."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


@pytest.mark.parametrize('schema, pattern, count', [
    ('citation-file-format', 'CITATION.cff', 1),
    ('github-issue-forms', '.github/ISSUE_TEMPLATE/*.yml', 2),
    ('github-workflows', '.github/workflows/*.yml', 2),
])
def test_valid_by_schema(schema, pattern, count):
    files = sorted(ROOT.glob(pattern))
    assert len(files) == count
    # the schemas are in the package
    command = [sys.executable, '-m', 'check_jsonschema', '--builtin-schema', f'vendor.{schema}', *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_run_every_step_of_ci_and_nothing_else():
    found = set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values():
            matrix = job.get('strategy', {}).get('matrix', {})
            of_matrix = [*matrix.get('steps', []), *(entry['steps'] for entry in matrix.get('include', []))]
            for command in [step['run'] for step in job.get('steps', []) if 'run' in step]:
                names = re.fullmatch(r'bash \.ci/run (.+)', command)[1]
                found.update(' '.join(of_matrix if names == '${{ matrix.steps }}' else [names]).split())
    lists = re.findall(r'^(?:other_)?steps=\((.*)\)', (ROOT / '.ci/run').read_text(encoding='utf-8'), re.MULTILINE)
    assert len(lists) == 2 and found == set(' '.join(lists).split())
