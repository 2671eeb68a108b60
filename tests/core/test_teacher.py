"""The snapshot teacher: a copy that follows its student only when it is told to."""

from __future__ import annotations

import math
import re
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from pskd import SnapshotTeacher
from pskd.teachers import MODEL_TEACHERS, EMATeacher, make_teacher

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other


class Student(nn.Module):
    """Running statistics, tied weights, dropout, a frozen layer, a buffer in no state dict."""

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(width, 7, bias=False)
        self.out.weight = self.embed.weight
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.norm(self.frozen(self.embed(words)))))


WORDS = torch.tensor([0, 3, 3, 6])


def train_a_step(student: nn.Module) -> None:
    """Change the weights, the running statistics, the unsaved buffer, and leave gradients."""
    student.train()
    student.zero_grad()
    student(WORDS).logsumexp(1).sum().backward()
    with torch.no_grad():
        student.unsaved += 1
        for parameter in student.parameters():
            parameter += 0.1 if parameter.grad is None else 0.5 * parameter.grad


def everything(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers, those that no state dict holds too."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare bit for bit, types and NaN included."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True, msg=name)


def differs_everywhere(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def refreshed(student: nn.Module) -> SnapshotTeacher:
    teacher = SnapshotTeacher()
    teacher.refresh(student)
    return teacher


@pytest.fixture
def student() -> Student:
    made = Student()
    train_a_step(made)
    return made


# -- Refresh ---------------------------------------------------------------------------------------


def test_a_step_of_training_changes_everything_that_a_teacher_copies(student):
    before = everything(student)
    train_a_step(student)
    assert differs_everywhere(before, everything(student))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_refresh_takes_every_weight_and_buffer(student, times):
    teacher = SnapshotTeacher()
    for _ in range(times):
        train_a_step(student)
        teacher.refresh(student)
    assert_same(everything(teacher.model), everything(student))


@pytest.mark.parametrize("times", [1, 2])
def test_later_training_does_not_reach_the_teacher(student, times):
    teacher = refreshed(student)
    for _ in range(times - 1):
        teacher.refresh(student)
    before = everything(teacher.model)
    train_a_step(student)
    assert_same(everything(teacher.model), before)


def test_the_teacher_predicts_as_the_student_in_eval_mode(student):
    teacher = refreshed(student)
    assert torch.equal(teacher.model(WORDS), teacher.model(WORDS))
    assert torch.equal(teacher.model(WORDS), student.eval()(WORDS))


@pytest.mark.parametrize("times", [1, 2])
def test_the_teacher_is_frozen_in_eval_mode_and_holds_no_gradient(student, times):
    assert any(parameter.grad is not None for parameter in student.parameters())
    teacher = SnapshotTeacher()
    for _ in range(times):
        teacher.refresh(student.train())
    assert not any(module.training for module in teacher.model.modules())
    for parameter in teacher.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not teacher.model(WORDS).requires_grad


@pytest.mark.parametrize("times", [1, 2])
def test_refresh_leaves_the_student_as_it_was(student, times):
    frozen = [p.requires_grad for p in student.parameters()]
    before, grads = everything(student), [p.grad for p in student.parameters()]
    teacher = SnapshotTeacher()
    for _ in range(times):
        teacher.refresh(student)
    assert_same(everything(student), before)
    assert all(module.training for module in student.modules())
    assert [p.requires_grad for p in student.parameters()] == frozen
    assert all(p.grad is grad for p, grad in zip(student.parameters(), grads, strict=True))


def test_tied_weights_stay_tied(student):
    teacher = refreshed(student)
    teacher.refresh(student)
    assert teacher.model.out.weight is teacher.model.embed.weight
    assert teacher.model.out.weight is not student.out.weight
    restored = SnapshotTeacher()
    restored.load_state_dict(teacher.state_dict(), student=Student(seed=1))
    assert restored.model.out.weight is restored.model.embed.weight


def test_the_teacher_is_of_the_students_type():
    teacher = refreshed(Student().to(torch.bfloat16))
    assert teacher.model.embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"device": "meta"}], ids=str)
def test_a_student_that_changed_its_type_or_device_is_followed(student, change):
    teacher = refreshed(student)
    student.to(**change)
    for _ in range(2):
        teacher.refresh(student)
        model = teacher.model
        for own, new in zip(
            model.state_dict().values(), student.state_dict().values(), strict=True
        ):
            assert (own.dtype, own.device) == (new.dtype, new.device)
        assert model.unsaved.device == student.unsaved.device
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    if "dtype" in change:
        assert_same(everything(teacher.model), everything(student))


def test_the_copy_is_made_once_while_the_type_stays(student):
    teacher = refreshed(student)
    model = teacher.model
    train_a_step(student)
    teacher.refresh(student)
    assert teacher.model is model


# -- Students that keep more than weights ----------------------------------------------------------


class Keeps(nn.Module):
    """Keeps what it computed, also in containers, as for a later look at its features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.register_buffer("running", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.hidden = self.layer(inputs)
        self.kept = {"hidden": [self.hidden, self.hidden.relu()]}
        self.running = 0.9 * self.running + 0.1 * self.hidden.mean()  # nobody detached it
        return self.hidden


class Grows(nn.Module):
    """Keeps features in buffers that grow: a memory bank, one of them in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.register_buffer("bank", torch.zeros(1, 5))
        self.register_buffer("unsaved", torch.zeros(1, 5), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(inputs)
        if self.training:
            self.bank = torch.cat([self.bank, hidden.detach()])
            self.unsaved = torch.cat([self.unsaved, hidden.detach()])
        return hidden + self.bank.mean(0) + self.unsaved.sum(0)


class Renames(nn.Module):
    """Has another head, of the same size, after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"0": nn.Linear(3, 5)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        ((name, head),) = self.heads.items()
        if self.training:
            self.heads = nn.ModuleDict({str(int(name) + 1): head})
        return head(inputs)


def computed(how) -> nn.Module:
    """Return a net whose weight is computed of others before each forward."""
    return nn.Sequential(how(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 5))


UNUSUAL = {
    "weight_norm": lambda: computed(weight_norm),
    "spectral_norm": lambda: computed(spectral_norm),
    "pruned": lambda: computed(lambda layer: prune.l1_unstructured(layer, "weight", 3)),
    "kept outputs": Keeps,
    "grown buffers": Grows,
    "renamed": Renames,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 5), nn.Dropout())),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(5), nn.Dropout()),
}


@pytest.mark.filterwarnings("ignore")  # of what torch calls deprecated
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_student_is_copied_before_and_after_each_epoch(kind):
    torch.manual_seed(0)
    inputs, student, teacher = torch.randn(6, 3), UNUSUAL[kind](), SnapshotTeacher()
    teacher.check(student)
    assert not teacher.available
    before = None
    for _ in range(3):
        student.train()(inputs).logsumexp(1).sum().backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
        teacher.refresh(student)
        with torch.no_grad():
            said, expected = teacher.model(inputs), student.eval()(inputs)
        assert torch.equal(said, expected) and (before is None or not torch.equal(said, before))
        assert not teacher.model(inputs).requires_grad
        assert all(parameter.requires_grad for parameter in student.parameters())
        before = said


class Holds(nn.Sequential):
    def __init__(self, held: object) -> None:
        super().__init__(nn.Linear(3, 5))
        self.held = held


class Owned(nn.Sequential):
    """Keeps its owner, which its copy does not have, as Lightning's modules keep their trainer."""

    def __init__(self, held: object) -> None:
        super().__init__(nn.Linear(3, 5))
        self.owner, self.held = [self], held

    def __getstate__(self) -> dict:
        return vars(self) | {"owner": None}


class Stateless(nn.Linear):
    def __getstate__(self) -> dict:
        raise TypeError("no state")


class Shared(nn.Linear):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: Holds(threading.Lock()), "got Holds with the attribute 'held': .*lock.*; leave"),
        (
            lambda: nn.Sequential(nn.ReLU(), Holds({"rows": (i for i in [])})),
            "got Holds '1' with the attribute 'held': .*generator.*; leave .* train with a memory",
        ),
        (lambda: Owned(threading.Lock()), "got Owned with the attribute 'held': .*lock.*; leave"),
        (lambda: nn.Sequential(Stateless(2, 2)), "got Stateless '0': no state; leave"),
        (lambda: Holds(Shared(2, 2)), "got Shared 'held', whose copy is itself; leave"),
    ],
)
def test_a_student_that_cannot_be_copied_is_refused_and_left_alone(student, message):
    student, teacher = student(), SnapshotTeacher()
    for method in (teacher.check, teacher.refresh):
        with pytest.raises(ValueError, match=f"^model: .* copy.deepcopy copies, {message}"):
            method(student)
    assert not teacher.available
    assert all(p.requires_grad for p in student.parameters())
    assert all(module.training for module in student.modules())


# -- Not a part of what holds it -------------------------------------------------------------------


def test_it_adds_nothing_to_the_module_that_holds_it(student):
    parameters, state = list(student.parameters()), list(student.state_dict())
    student.teacher = refreshed(student)
    assert not isinstance(student.teacher, nn.Module)
    assert all(p is q for p, q in zip(student.parameters(), parameters, strict=True))
    assert list(student.state_dict()) == state
    student.train()
    assert not student.teacher.model.training
    assert not student.teacher.model.dropout.training


def models_behind(student: nn.Module) -> int:
    """Return how many models hang on a student that carries its teacher: copies of copies too."""
    models = [student]
    while models[-1].teacher.available and models[-1].teacher.model not in models:
        models.append(models[-1].teacher.model)
    return len(models) - 1


def test_there_is_one_copy_however_often_it_is_refreshed_or_loaded(student):
    student.teacher = teacher = SnapshotTeacher()
    assert models_behind(student) == 0
    for _ in range(3):
        teacher.refresh(student)
        assert models_behind(student) == 1
    for _ in range(3):
        teacher.load_state_dict(teacher.state_dict(), student=student)
        assert models_behind(student) == 1


# -- Before the first refresh ----------------------------------------------------------------------


def test_there_is_no_teacher_before_the_first_refresh(student):
    teacher = SnapshotTeacher()
    assert teacher.available is False
    with pytest.raises(RuntimeError, match=r"no model: expected refresh\(\)"):
        _ = teacher.model
    teacher.refresh(student)
    assert teacher.available is True


def test_the_state_of_no_teacher_is_no_teacher(student):
    state = SnapshotTeacher().state_dict()
    teacher = refreshed(student)
    teacher.load_state_dict(state, student=student)
    assert not teacher.available
    assert teacher.state_dict() == state


# -- State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("held", [None, 2], ids=["into none", "over another"])
def test_a_saved_state_restores_the_teacher_bit_for_bit(dtype, held, tmp_path):
    student = Student().to(dtype)
    train_a_step(student)
    with torch.no_grad():
        values = torch.tensor([math.nan, -0.0, math.inf, 1e-40, 1 / 3, 2.0**-24, 65504.0])
        student.embed.weight[:, 0] = values.to(dtype)
    teacher = refreshed(student)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")

    other = Student(seed=1).to(dtype)
    restored = SnapshotTeacher() if held is None else refreshed(Student(seed=held).to(dtype))
    state = torch.load(tmp_path / "teacher.pt", weights_only=True)
    restored.load_state_dict(state, student=other)
    assert_same(dict(restored.model.state_dict()), dict(teacher.model.state_dict()))
    assert restored.model.embed.weight[1, 0].signbit()  # -0.0, which equals 0.0
    assert not any(module.training for module in restored.model.modules())
    assert not any(p.requires_grad for p in restored.model.parameters())


def test_a_teacher_that_holds_a_model_needs_no_student_to_load(student):
    teacher = refreshed(student)
    state, before = teacher.state_dict(), everything(teacher.model)
    train_a_step(student)
    teacher.refresh(student)
    assert differs_everywhere(before, everything(teacher.model))
    teacher.load_state_dict(state)
    assert_same(dict(teacher.model.state_dict()), state["model"])


def test_loading_takes_no_weight_of_the_student_and_leaves_it_alone(student):
    state = refreshed(student).state_dict()
    other = Student(seed=1)
    before = everything(other)
    restored = SnapshotTeacher()
    restored.load_state_dict(state, student=other)
    train_a_step(restored.model.requires_grad_(True))
    assert_same(everything(other), before)
    assert other.training


def test_a_state_does_not_change_with_the_teacher_or_with_the_student(student):
    teacher = refreshed(student)
    state = teacher.state_dict()
    before = {name: tensor.clone() for name, tensor in state["model"].items()}
    train_a_step(student)
    teacher.refresh(student)
    assert_same(state["model"], before)
    restored = SnapshotTeacher()
    restored.load_state_dict(state, student=student)
    restored.refresh(Student(seed=1))
    assert_same(state["model"], before)


def test_a_resumed_teacher_goes_on_as_the_one_that_was_saved(student):
    straight = refreshed(student)
    resumed = SnapshotTeacher()
    resumed.load_state_dict(straight.state_dict(), student=Student(seed=1))
    train_a_step(student)
    for teacher in (straight, resumed):
        teacher.refresh(student)
    assert_same(everything(resumed.model), everything(straight.model))


def broken(state: dict, how: str) -> dict:
    """Return a state in which every weight is another, and one does not fit."""
    weights = {name: tensor + 1 for name, tensor in state["model"].items()}
    if how == "shape":
        weights["frozen.weight"] = torch.zeros(9, 9)
    elif how == "missing":
        del weights["frozen.weight"]
    else:
        weights["other.weight"] = torch.zeros(2)
    return {"model": weights}


@pytest.mark.parametrize("how", ["shape", "missing", "unexpected"])
@pytest.mark.parametrize("give_student", [True, False])
def test_a_state_that_does_not_fit_leaves_the_old_teacher(how, give_student, student):
    teacher = refreshed(student)
    before = everything(teacher.model)
    state = broken(teacher.state_dict(), how)
    named = "other.weight" if how == "unexpected" else "frozen.weight"
    message = f"teacher: expected the weights of this model: .*{re.escape(named)}"
    with pytest.raises(ValueError, match=message):
        teacher.load_state_dict(state, student=student if give_student else None)
    assert teacher.available
    assert_same(everything(teacher.model), before)


def test_a_state_that_does_not_fit_leaves_no_teacher_where_there_was_none(student):
    teacher = SnapshotTeacher()
    with pytest.raises(ValueError, match="of this model: size mismatch for .*") as error:
        teacher.load_state_dict(refreshed(student).state_dict(), student=Student(width=4))
    assert not teacher.available
    assert len(str(error.value).splitlines()) == 1  # of many that do not fit


@pytest.mark.parametrize("state", [{}, {"weights": {}}, None, [1]])
def test_what_is_no_teachers_state_is_refused(state, student):
    teacher = refreshed(student)
    before = everything(teacher.model)
    with pytest.raises(ValueError, match=r"expected a teacher's state .*'model', got") as error:
        teacher.load_state_dict(state, student=student)
    assert repr(state) in str(error.value)
    assert_same(everything(teacher.model), before)


def test_without_an_architecture_a_state_is_refused(student):
    state = refreshed(student).state_dict()
    with pytest.raises(ValueError, match="expected a student .*, got none"):
        SnapshotTeacher().load_state_dict(state)


# ---- the mean over epochs ------------------------------------------------------------------------


def test_an_ema_teacher_is_the_mean_that_halves_with_each_epoch(student):
    teacher, past = EMATeacher(), []
    for _ in range(3):
        train_a_step(student)
        teacher.refresh(student)
        past.append(everything(student))
    now = everything(teacher.model)
    buffers = {name for name, _ in student.named_buffers()}
    for name, tensor in now.items():
        mean = 0.25 * past[0][name] + 0.25 * past[1][name] + 0.5 * past[2][name]
        torch.testing.assert_close(tensor, past[2][name] if name in buffers else mean, msg=name)
    # Unlike a snapshot it cannot be made anew of the student that a checkpoint has.
    assert teacher.state_dict(ended=True)["model"] is not None
    assert refreshed(student).state_dict(ended=True)["model"] is None


def test_a_teacher_is_made_by_its_name():
    assert {name: type(make_teacher(name)) for name in MODEL_TEACHERS} == MODEL_TEACHERS
    for name in ("me", ["me"]):
        with pytest.raises(
            ValueError, match="teacher: expected one of 'snapshot', 'ema', got .*me"
        ):
            make_teacher(name)


def test_an_ema_teacher_copies_what_has_no_mean():
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Parameter(torch.ones(2, dtype=torch.float16))
            self.weight = nn.Parameter(torch.ones(2))
            self.codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)

        def get_extra_state(self) -> float:
            return float(self.weight[0])

        def set_extra_state(self, state: float) -> None:
            self.extra = state

    student, teacher = Quantised(), EMATeacher()
    teacher.refresh(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(2)
    teacher.refresh(student)
    own = teacher.model
    assert [p.tolist() for p in (own.short, own.weight, own.codes)] == [[2, 2], [2, 2], [3, 3]]
    assert own.extra == 3.0
