"""Children of a process that has used torch's threads: by fork, by spawn, and as workers of a DataLoader."""

from __future__ import annotations

import pytest
from programs import run_python

# libgomp takes the parent's team for the child's own, and waits for it: see awq_ext/forwards/forked.py
BEFORE = """
import multiprocessing, os, signal, sys, tempfile, warnings
import torch
import awq_ext

def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))

def quantized(model=None):
    torch.manual_seed(1)
    calibration = [torch.randn(64, 256)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return awq_ext.quantize(model or made(), calibration, group_size=64, n_grid=3, progress=False)

def use_the_team():
    torch.set_num_threads(2)
    torch.randn(4_000_000).exp().sum()
"""
FORK = (
    BEFORE
    + """
use_the_team()
model, folder = quantized(), tempfile.mkdtemp() + "/x"
awq_ext.save(model, folder)
x = torch.randn(300, 256)
expected, layer = model(x), model[0](x)
torch.set_num_threads(1)
alone = quantized()(x)  # torch's own sums depend on the number of threads
torch.set_num_threads(2)

def forward():
    found = model[0](x)
    torch.set_num_threads(1)  # for torch's own comparison
    assert torch.equal(found, layer)

def quantize():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        calibration = [torch.randn(64, 256)]
        again = awq_ext.quantize(made(), calibration, group_size=64, n_grid=3, progress=False)
    assert any("quantize runs on one thread" in str(each.message) for each in caught)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(again(x), alone)

def load():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = awq_ext.load(made(), folder)
    torch.set_num_threads(1)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

def save():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        awq_ext.save(model, folder + "2")
        awq_ext.convert(folder, folder + "3", format="native")

child = os.fork()
if child == 0:
    signal.alarm(90)
    globals()[sys.argv[1]]()
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
"""
)
WORKERS = (
    BEFORE
    + """
from torch.utils.data import DataLoader, Dataset

class Answers(Dataset):
    def __init__(self, model):
        self.model = model
    def __len__(self):
        return 4
    def __getitem__(self, i):
        x = torch.full((3, 256), float(i))
        return (self.model if i % 2 else quantized())(x).detach()

if __name__ == "__main__":
    signal.alarm(200)
    use_the_team()
    model = quantized()
    expected = [model(torch.full((3, 256), float(i))) for i in range(4)]
    loader = DataLoader(Answers(model), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1])
    for found, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, wanted)
"""
)


@pytest.mark.fault(
    "Processes and threads",
    "`{what}` in a child of fork() after torch's threads were used",
    "It ends; work with torch's own operations runs on one thread there, with a warning",
)
@pytest.mark.parametrize("what", ["forward", "quantize", "load", "save"])
def test_a_forked_child_comes_to_an_end(what: str) -> None:
    done = run_python("-W", "ignore::DeprecationWarning", "-c", FORK, what)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(
    "Processes and threads",
    "Workers of a DataLoader ({start}) quantize, or call quantized layers",
    "The results are those of the main process",
)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = tmp_path_factory.mktemp("workers") / "program.py"  # spawn imports the main module, which needs a file
    program.write_text(WORKERS)
    done = run_python(str(program), start)
    assert done.returncode == 0, done.stderr
