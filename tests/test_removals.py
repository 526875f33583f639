"""Every place that removes or replaces a file or a run, with why what goes is ours.

A new place fails here until its reason is written down; one that is gone, until its line is.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REMOVES = {"unlink", "rmtree", "rename", "rm", "rm_file", "rmdir", "remove", "removedirs"}
REMOVES |= {"truncate", "delete_run", "delete_experiment", "delete_artifacts"}
REMOVES |= {"delete_logged_model", "delete_model_version"}
OVERWRITES = {"write_text", "write_bytes", "copyfile", "copytree", "copy2", "move"}
LIBRARIES = {"savefig", "save_file", "save_pretrained", "open_memmap"}
OURS = {"write_text", "write_json"}  # of cpfean.records.trial_record
RUN = "in the folder of a run, which was new or held nothing else when it was made, and is locked"
WORK = "in the unfinished folder of an extraction, which is locked, and held nothing else at first"
NEW = "a file or folder that this very call has made, under a name drawn at random"

PLACES = {
    "cpfean.data.convert.native:NativeWriter.finish": "renames to a name that was free; what is "
    "there by now is not replaced, as a folder with files never is",
    "cpfean.data.convert.native:NativeWriter._start": "in the unfinished folder that it has made",
    "cpfean.data.convert.native:NativeWriter._remove": "the unfinished folder that it has made",
    "cpfean.data.convert.native:NativeWriter._write_captions": "in the same folder",
    "cpfean.data.convert.native:_write_lines": "in the unfinished folder that it has made",
    "cpfean.data.provenance:write_provenance": "in the unfinished folder of `NativeWriter`",
    "cpfean.data.sources:fetch_folder": "in remote-HASH of the cache: leftovers by their prefix, "
    "and what the record says was fetched; other data there is refused first",
    "cpfean.data.sources:_generated": "leftovers under .unfinished-, and its own new folder; the "
    "name that it gives was free",
    "cpfean.data.sources:_fetch": f"{NEW}; what it replaces was fetched, by the record",
    "cpfean.data.sources:_write_record": "the record of what was fetched",
    "cpfean.data.synthetic:_write_lines": "in the new folder that the set is made in",
    "cpfean.data.synthetic:_write_truth": "in the new folder that the set is made in",
    "cpfean.data.synthetic:write_synthetic": "in the new folder that the set is made in",
    "cpfean.data.tokens:CaptionTokenizer.save": "in the folder that the caller names for a model",
    "cpfean.extraction.assembly:assemble": "renames to a name that was free; what is there by now is "
    "not replaced, as a folder with files never is",
    "cpfean.extraction.work_folder:WorkFolder._clear": f"{WORK}, by their exact names or endings",
    "cpfean.extraction.work_folder:WorkFolder._read": f"{WORK}: a batch whose bytes are damaged",
    "cpfean.extraction.work_folder:WorkFolder.discard": WORK,
    "cpfean.extraction.work_folder:WorkFolder.forget": f"{WORK}: batches to be made again",
    "cpfean.extraction.work_folder:_write": WORK,
    "cpfean.folders:note": "a note of the cache, named by a hash of what it is about",
    "cpfean.model.cpfean:Cpfean.save_pretrained": "in the folder that the caller names for a model",
    "cpfean.publishing.push:prepared": NEW,
    "cpfean.search.array_folders:_make": f"{NEW}, and leftovers of the same array folder by their "
    "prefix, under its lock; the name that it gives was free",
    "cpfean.search.page.server:serve": NEW,
    "cpfean.training.checkpoint:Checkpoint._write": "in the folder that the caller names for a "
    "checkpoint, which `CheckpointFolder` has made",
    "cpfean.training.checkpoint:_write_manifest": "in the same folder",
    "cpfean.training.text_cache:_write": "a file of the cache, named by a hash of what it holds",
    "experiments.schedule:_compare_with_the_last": RUN,
    "experiments.show:_write_csv": "in a folder of results that `own_folder` has taken",
    "experiments.terminal:_forgiving": "the null device",
    "cpfean.records.budget:Meter.save": RUN,
    "experiments.command_line:named": "the empty folder that it has made to claim a name",
    "cpfean.storage.checkpoints:CheckpointFolder.new_attempt": RUN,
    "cpfean.storage.checkpoints:CheckpointFolder._write": f"{RUN}: leftovers by their prefix, and a "
    "checkpoint of the same name",
    "cpfean.storage.checkpoints:CheckpointFolder._upload": "under the study's own id in the storage",
    "cpfean.storage.checkpoints:CheckpointFolder._remove": "a checkpoint by its exact name, in the "
    "folder of a trial",
    "cpfean.storage.check_file:check_file": NEW,
    "orchestration.study.records_copy:CopyFolder.get": RUN,
    "orchestration.study.records_copy:CopyFolder.put": "under studies/NAME of the storage, once `check` has found "
    "no other study there",
    "orchestration.study.records_copy:fetch_records": "a run's folder that is not on this machine",
    "cpfean.analysis.probe_report:write_results": "in a folder of results that `own_folder` has taken",
    "cpfean.records.run_folder:RunFolder.write": RUN,
    "cpfean.writing:write_json": "a file that is ours by its folder: see who calls it",
    "cpfean.analysis.report:write_report": RUN,
    "cpfean.analysis.search_report:write_search_report": RUN,
    "cpfean.records.results:Results.keep": "a result, named by a hash of all that it depends on",
    "orchestration.tracking.server:ServerPlan.environment": "in the server's own folder",
    "orchestration.tracking.stores:_try_file": NEW,
    "orchestration.study.conclusion:conclude": RUN,
    "cpfean.analysis.pictures.queries:draw_study_pictures": f"{RUN}; the name that it gives was free",
    "cpfean.analysis.pictures.sheet:Sheet.save": "in a folder of results that `own_folder` has "
    "taken, in one of a run, or the file that the user names",
    "cpfean.analysis.probe_report:_save": "in a folder of results that `own_folder` has taken",
    "cpfean.writing:write_text": "a file that is ours by its folder: see who calls it",
    "cpfean.writing:_written": NEW,
    "orchestration.proposals.optuna_study:Proposals.export": f"{RUN}; study.db of earlier releases "
    "was read back, and is an export by now",
    "orchestration.proposals.optuna_study:_remove": f"{RUN}: what a killed export has left, by its exact name",
    "orchestration.schedule.rounds:Schedule.only_round": "its lock, in the schedule's own folder",
    "orchestration.schedule.suites:edited_suites": "the suites, which it has just read under a lock",
    "orchestration.tracking.stores:_make": f"{NEW}, and such names that a killed process has left",
    "orchestration.tracking.stores:_remove_old_mark": "an empty mark of earlier releases, by its exact name",
    "orchestration.tracking.stores:try_out": "the run that it has made to try writing with",
    "orchestration.study.conclusion:keep_model": f"{RUN}: best_model, or a model of a trial",
    "orchestration.tracking.models:log_model": "an unfinished twin of our model, with its run and digest",
    "orchestration.tracking.models:register": "a twin of the version that it has just made",
    "orchestration.tracking.runs:Runs._sole": "a twin of our run, with its key and no numbers",
}  # fmt: skip


def test_every_place_that_removes_or_replaces_has_its_reason() -> None:
    found = {place for path in sources() for place in places(path)}
    assert found - PLACES.keys() == set(), "say here why what goes is ours"
    assert PLACES.keys() - found == set(), "no longer there"


def test_a_removal_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    removals = ("p.unlink()", "os.replace(a, b)", "p.replace(q)", "shutil.rmtree(p)", "p.rename(q)")
    writes = ("p.write_text('a')", "p.open('w')", "open(p, 'wb')", "f.truncate(0)", "np.save(p, a)")
    for call in (*removals, *writes):
        path.write_text(f"def work():\n    {call}\n", encoding="utf-8")
        assert list(places(path, name="m")) == ["m:work"], call
    for call in (
        "text.replace('a', 'b')",
        "p.open()",
        "open(p, 'rb')",
        "items.remove",
        "p.open('x')",
    ):
        path.write_text(f"def work():\n    {call}\n", encoding="utf-8")
        assert list(places(path, name="m")) == [], call


def sources() -> Iterator[Path]:
    for floor in ("cpfean", "orchestration", "experiments"):
        yield from sorted((ROOT / floor).rglob("*.py"))


def places(path: Path, *, name: str = "") -> Iterator[str]:
    """Module and function of every call that removes or replaces something."""
    name = name or ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def visit(node: ast.AST, where: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = (*where, node.name)
        if isinstance(node, ast.Call) and is_removal(node):
            yield f"{name}:{'.'.join(where)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, where)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), ())


def is_removal(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute):
        called, owner = function.attr, ast.unparse(function.value)
    elif isinstance(function, ast.Name):
        called, owner = function.id, ""
    else:
        return False
    if called == "replace":  # of a path or of os, and not of a text
        return owner == "os" or (len(call.args) == 1 and not call.keywords)
    if called == "save":
        return owner == "np"
    if called == "open":
        modes = [word.value for word in call.args if isinstance(word, ast.Constant)]
        return any(mode in ("w", "wb", "w+", "w+b", "r+", "r+b") for mode in modes)
    if not owner:
        return called in OURS | LIBRARIES
    # Functions of ours that have such names only make lines, or write by `write_text`.
    ours = ("commands", "schedule")
    return called in REMOVES | OVERWRITES | LIBRARIES and owner not in ours
