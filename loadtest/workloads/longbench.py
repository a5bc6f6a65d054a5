"""LongBench (arXiv 2308.14508): its 16 English data sets, from the hub or a folder of its JSONL.

Prompts, answer lengths and metrics are the benchmark's; prompts over the cap lose their middle
before the chat template is put around them, as in LongCTX-Bench (arXiv 2407.01527). Few-shot and
code tasks get no chat template.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from loadtest.errors import LoadTestError
from loadtest.workloads.base import Workload
from loadtest.workloads.fitting import excess
from loadtest.workloads.item import Item
from loadtest.workloads.jsonl import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.workloads.tokens import Tokenizer

HUB = "hf://datasets/zai-org/LongBench/data.zip"
UNLIMITED = 2**31
SAMPLE = "What is it?"  # to see what a chat template adds

# of trec, as the benchmark spells them
_TYPES = (
    "Abbreviation; Animal; City; Color; Country; Currency name; Date; Definition of something; "
    "Description of a person; Description of something; Disease and medicine; Distance, linear "
    "measure; Element and substance; Equivalent term; Event; Expression abbreviated; Food; "
    "Group or organization of person; Individual; Invention, book and other creative piece; "
    "Language; Lasting time of somethin; Letter like a-z; Manner of an action; Mountain; "
    "Musical instrument; Number of something; Order, rank; Organ of body; Other entity; Other "
    "location; Other number; Percent, fraction; Plant; Postcode or other code; Price; Product; "
    "Reason; Religion; Size, area and volume; Speed; Sport; State; Symbols and sign; Techniques"
    " and method; Temperature; Title of a person; Vehicle; Weight; Word with a special property"
)
QUESTION_TYPES = tuple(_TYPES.split("; "))

_SHORT = "as concisely as you can, using a single phrase"
_JOINED = _SHORT.replace("as concisely", "asconcisely")  # the benchmark's spelling
_NO_WHY = "Do not provide any explanation."
_ONLY = "Only give me the answer and do not output any other words."
_PAPER = (
    f"{_SHORT} or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, '
    f'answer "yes", "no", or "unanswerable". {_NO_WHY}'
)
_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given "
    "passages.\n{context}\n\nAnswer the question based on the given passages. "
    f"{_ONLY}\n\nQuestion: {{input}}\nAnswer:"
)
_UNIQUE = "after removing duplicates"


@dataclass(frozen=True)
class DataSet:
    """How one data set is asked and scored.

    Attributes:
        category: as in the paper's table.
        max_tokens: longest answer.
        metric: name in ``quality.METRICS``.
        prompt: template with ``{context}`` and perhaps ``{input}``.
        chat: whether the model's chat template goes around it.
        classes: of a classification, where a row does not list them.

    """

    category: str
    max_tokens: int
    metric: str
    prompt: str
    chat: bool = True
    classes: tuple[str, ...] = ()


DATA_SETS: dict[str, DataSet] = {
    "narrativeqa": DataSet(
        "single-doc QA", 128, "f1",
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {_JOINED} if possible. {_NO_WHY}\n\nStory: {{context}}\n\nNow, "
        f"answer the question based on the story {_JOINED} if possible. {_NO_WHY}\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "qasper": DataSet(
        "single-doc QA", 128, "f1",
        f"You are given a scientific article and a question. Answer the question {_PAPER}\n\n"
        f"Article: {{context}}\n\n Answer the question based on the above article {_PAPER}\n\n"
        "Question: {input}\n\nAnswer:",
    ),
    "multifieldqa_en": DataSet(
        "single-doc QA", 64, "f1",
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
    ),
    "hotpotqa": DataSet("multi-doc QA", 32, "f1", _PASSAGES),
    "2wikimqa": DataSet("multi-doc QA", 32, "f1", _PASSAGES),
    "musique": DataSet("multi-doc QA", 32, "f1", _PASSAGES),
    "gov_report": DataSet(
        "summarization", 512, "rouge_l",
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": DataSet(
        "summarization", 512, "rouge_l",
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
    ),
    "multi_news": DataSet(
        "summarization", 512, "rouge_l",
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    ),
    "trec": DataSet(
        "few-shot", 64, "class_accuracy_first_line",
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{input}",
        chat=False,
        classes=QUESTION_TYPES,
    ),
    "triviaqa": DataSet(
        "few-shot", 32, "f1_first_line",
        f"Answer the question based on the given passage. {_ONLY} The following are some "
        "examples.\n\n{context}\n\n{input}",
        chat=False,
    ),
    "samsum": DataSet(
        "few-shot", 128, "rouge_l_first_line",
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        chat=False,
    ),
    "passage_retrieval_en": DataSet(
        "synthetic", 32, "retrieval",
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}"
        "\n\nPlease enter the number of the paragraph that the abstract is from. The answer "
        'format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    "passage_count": DataSet(
        "synthetic, not averaged", 32, "count",
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there "
        f"are {_UNIQUE}. In other words, how many non-repeating paragraphs are there in total?"
        f"\n\n{{context}}\n\nPlease enter the final count of unique paragraphs {_UNIQUE}. The "
        "output format should only contain the number, such as 1, 2, 3, and so on.\n\n"
        "The final answer is: ",
    ),
    "lcc": DataSet(
        "code", 64, "edit_similarity",
        "Please complete the code given below. \n{context}Next line of code:\n",
        chat=False,
    ),
    "repobench-p": DataSet(
        "code", 64, "edit_similarity",
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        chat=False,
    ),
}  # fmt: skip


class LongBench(Workload):
    """``rows`` rows (0: all) of each data set, in the order of the files.

    Without ``folder`` the hub is asked (``pip install '.[longbench]'`` in a clone). ``cap`` is the
    most tokens of a prompt; 0: what the server takes.
    """

    kind: ClassVar[str] = "longbench"
    about: ClassVar[str] = "the 16 English data sets of LongBench"

    folder: str = ""
    tasks: tuple[str, ...] = tuple(DATA_SETS)
    rows: int = Field(default=0, ge=0)
    cap: int = Field(default=0, ge=0)

    def make(self, tokenizer: Tokenizer, seed: int, longest: int | None) -> list[Item]:
        found: list[Item] = []
        for task in self.tasks:
            if task not in DATA_SETS:
                raise LoadTestError(
                    f"unknown LongBench task {task!r}; known: {' '.join(DATA_SETS)}"
                )
            for index, (place, row) in enumerate(self._rows(task)):
                if self.rows and index >= self.rows:
                    break
                found.append(self._item(task, place, row, index, tokenizer, longest))
        if not found:
            raise LoadTestError("workload longbench: no rows")
        return found

    def _rows(self, task: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.folder:
            yield from hub_rows(task)
            return
        path = Path(self.folder).expanduser() / f"{task}.jsonl"
        empty = True
        for number, row in read_jsonl(path):
            empty = False
            yield f"{path}:{number}", row
        if empty:
            raise LoadTestError(f"{path}: no rows")

    def _item(
        self,
        task: str,
        place: str,
        row: dict[str, Any],
        index: int,
        tokenizer: Tokenizer,
        longest: int | None,
    ) -> Item:
        data = DATA_SETS[task]
        answers = row.get("answers")
        texts = [row.get("context"), row.get("input")]
        if not isinstance(answers, list) or not all(isinstance(t, str) for t in [*texts, *answers]):
            raise LoadTestError(f"{place}: needs context and input as texts, answers as a list")
        item = Item(
            id=_name(task, index, row.get("_id")),
            task=task,
            category=data.category,
            prompt=data.prompt.format(context=row["context"], input=row["input"]),
            max_tokens=data.max_tokens,
            metric=data.metric,
            references=tuple(answers),
            classes=_classes(row.get("all_classes"), place) or data.classes,
            chat=data.chat,
        )
        return _cut(item, self.cap or UNLIMITED, tokenizer, longest)


def _name(task: str, index: int, known: object) -> str:
    """An id of its own: the benchmark's may be missing, or be there twice."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", str(known))[:64] if known is not None else ""
    return f"{task}-{index}-{plain}" if plain else f"{task}-{index}"


def _cut(item: Item, cap: int, tokenizer: Tokenizer, longest: int | None) -> Item:
    """Without its middle, if its prompt is above the cap or the server does not take it.

    Raises:
        LoadTestError: the answer leaves no room for a prompt.

    """
    if longest is not None:
        around = tokenizer.count_sent(SAMPLE, item.chat) - tokenizer.count([SAMPLE])[0]
        room = longest - item.max_tokens - around
        if room <= 0:
            raise LoadTestError(
                f"{item.task}: answers of {item.max_tokens} tokens leave no room: the server "
                f"takes {longest}"
            )
        cap = min(cap, room)
    if cap >= UNLIMITED:
        return item
    shorter = replace(item, prompt=tokenizer.cut_middle(item.prompt, cap))
    # what was cut may be read as other tokens than those it was made of
    while longest is not None and (over := excess(shorter, tokenizer, longest)) > 0 and cap > over:
        cap -= over
        shorter = replace(item, prompt=tokenizer.cut_middle(item.prompt, cap))
    return shorter


def hub_rows(task: str, archive: str = HUB) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a data set out of LongBench's zip archive, through ``datasets``.

    The hub's data set is a zip and a loading script, which ``datasets`` 4 no longer runs; its
    files are therefore addressed inside the zip.

    Raises:
        LoadTestError: ``datasets`` is missing or the archive cannot be read.

    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise LoadTestError(
            "workload longbench: give folder=..., or pip install '.[longbench]' in a clone"
        ) from None
    try:
        rows = load_dataset(
            "json", data_files=f"zip://data/{task}.jsonl::{archive}", split="train", streaming=True
        )
        for index, row in enumerate(rows):
            yield f"{archive}:{task}:{index + 1}", row
    except LoadTestError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        raise LoadTestError(f"workload longbench: {task} from {archive}: {error}") from None


def _classes(value: object, place: str) -> tuple[str, ...]:
    """Classes as a list, or as its text, as in some copies of the files; empty if there are none.

    Raises:
        LoadTestError: something else.

    """
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise LoadTestError(f"{place}: all_classes is not a list") from None
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(c, str) and c for c in value):
        raise LoadTestError(f"{place}: all_classes is not a list of names")
    return tuple(value)
