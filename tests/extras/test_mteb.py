"""mteb scores our encoder as `conan eval` does: its mock tasks pass, and local tasks of each kind give the same figure."""

import gzip
import json
import os
from collections import defaultdict

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

mteb = pytest.importorskip("mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402
from typer import Typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from conan_jax import config  # noqa: E402
from conan_jax.cli.eval import evaluate as command  # noqa: E402
from conan_jax.data.tokenizer import train_tokenizer  # noqa: E402
from conan_jax.errors import ConfigError, DataError  # noqa: E402
from conan_jax.eval import clustering, evaluate  # noqa: E402
from conan_jax.eval.mteb_wrapper import MtebEncoder, evaluate_tasks, prompt_map  # noqa: E402
from conan_jax.inference.encoder import Encoder  # noqa: E402
from conan_jax.model import Embedder  # noqa: E402

WORDS = "array sum file read write socket tensor gradient parse date sort key value thread lock queue stack heap".split()
TOPICS = {"data": WORDS[:6], "maths": WORDS[6:12], "code": WORDS[12:]}
MODEL = config.Model(vocab_size=300, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
                     rope_theta=100.0, compute_dtype="float32", scan_layers=False, remat="none")
LENGTH = 48


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of small problems wait for each other, for minutes on a busy machine."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    rng = np.random.default_rng(0)
    corpus = [" ".join(rng.choice(WORDS, 12)) for _ in range(200)]
    tokenizer = train_tokenizer(corpus, config.Tokenizer(vocab_size=290), tmp_path_factory.mktemp("tokenizer"))
    params = jax.jit(Embedder(MODEL).init)(jax.random.key(3))
    prompts = {"query": "Instruct: find it\nQuery: ", "LocalSTS": "Instruct: compare\nQuery: ",
               "Classification": "Instruct: name it\nQuery: "}
    return Encoder(params, MODEL, tokenizer, identity={"run": "toy", "stage": "weak", "step": 7}, prompts=prompts)


@pytest.fixture(scope="module")
def model(encoder):
    return MtebEncoder(encoder, max_length=LENGTH)


def text(rng, topic=None, low=3, high=12):
    return " ".join(rng.choice(TOPICS[topic] if topic else WORDS, rng.integers(low, high)))


def labelled(count, seed):
    rng = np.random.default_rng(seed)
    return [{"text": text(rng, topic), "label": topic} for topic in rng.choice(sorted(TOPICS), count)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(data.encode())) if path.suffix == ".gz" else path.write_text(data)
    return str(path)


def metadata(name, kind, main, langs=None):
    return TaskMetadata(
        name=name, type=kind, main_score=main, description="local", reference="https://example.org",
        dataset={"path": "NA", "revision": "NA"},
        category="t2t", eval_splits=["test"], eval_langs=langs or ["eng-Latn"], date=("2024-01-01", "2024-01-02"), dialect=[], domains=[],
        task_subtypes=[], license="cc-by-4.0", annotations_creators="derived", modalities=["text"], sample_creation="found",
        bibtex_citation="")


def score(model, task):
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"]


def test_the_mock_tasks_pass(model):
    assert model.mteb_model_meta.name == "conan_jax/toy" and model.mteb_model_meta.revision == "weak-7"
    results = mteb.mock_run(model)
    failed = {name: str(status.exception)[:300] for name, status in results.items() if status is not None and hasattr(status, "exception")}
    assert results.all_passed and not failed and sum(status is not None for _, status in results.items()) >= 20


def test_retrieval_is_the_same(model, encoder, tmp_path):
    rng = np.random.default_rng(1)
    documents = {f"d{i}": text(rng, low=4, high=20) for i in range(150)}
    queries = {f"q{i}": " ".join(rng.choice(documents[f"d{i}"].split(), 3)) for i in range(30)}
    qrels = {q: {f"d{q[1:]}": 2, f"d{rng.integers(0, 150)}": 1} for q in queries}
    write(tmp_path / "corpus.jsonl", [{"_id": d, "title": "about" if int(d[1:]) % 3 else "", "text": t} for d, t in documents.items()])
    write(tmp_path / "queries.jsonl", [{"_id": q, "text": t} for q, t in queries.items()])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"{q}\t{d}\t{g}\n" for q, rels in qrels.items() for d, g in rels.items()))

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, num_proc=None, **kwargs):
            corpus = [{"id": d, "title": "about" if int(d[1:]) % 3 else "", "text": t} for d, t in documents.items()]
            asked = [{"id": q, "text": t} for q, t in queries.items()]
            data = RetrievalSplitData(corpus=Dataset.from_list(corpus), queries=Dataset.from_list(asked),
                                      relevant_docs=qrels, top_ranked=None)
            self.dataset = defaultdict(dict, default={"test": data})
            self.data_loaded = True

    theirs = score(model, LocalRetrieval())[0]
    ours = evaluate(encoder, config.Evaluation("e", "retrieval", str(tmp_path), split="test", prompt_name="query", max_length=LENGTH))
    assert 0.05 < ours["ndcg@10"] < 0.95
    for mine, name in (("ndcg@10", "ndcg_at_10"), ("recall@20", "recall_at_20"), ("recall@100", "recall_at_100"), ("mrr@10", "mrr_at_10")):
        assert theirs[name] == pytest.approx(ours[mine], abs=5.1e-6), mine  # mteb rounds them to five digits


def test_sts_is_the_same_with_the_prompt_of_the_task(model, encoder, tmp_path):
    rng = np.random.default_rng(2)
    rows = [{"sentence1": text(rng), "sentence2": text(rng), "score": float(rng.integers(0, 6))} for _ in range(60)]

    class LocalSTS(AbsTaskSTS):
        metadata = metadata("LocalSTS", "STS", "cosine_spearman")

        def load_data(self, num_proc=None, **kwargs):
            self.dataset = DatasetDict(test=Dataset.from_list(rows))
            self.data_loaded = True

    theirs = score(model, LocalSTS())[0]
    path = write(tmp_path / "sts.jsonl", rows)
    ours = evaluate(encoder, config.Evaluation("e", "sts", path, instruction="compare", max_length=LENGTH))
    bare = evaluate(encoder, config.Evaluation("e", "sts", path, max_length=LENGTH))
    assert ours["spearman"] == pytest.approx(theirs["cosine_spearman"], abs=1e-6) and abs(ours["spearman"] - bare["spearman"]) > 1e-4
    assert ours["pearson"] == pytest.approx(theirs["cosine_pearson"], abs=1e-6)


def test_classification_is_the_same(model, encoder, tmp_path):
    train, test = labelled(120, 3), labelled(80, 4)
    number = {name: i for i, name in enumerate(sorted(TOPICS))}

    class LocalClassification(AbsTaskClassification):
        metadata = metadata("LocalClassification", "Classification", "accuracy")

        def load_data(self, num_proc=None, **kwargs):
            self.dataset = DatasetDict({name: Dataset.from_list([r | {"label": number[r["label"]]} for r in rows])
                                        for name, rows in (("train", train), ("test", test))})
            self.data_loaded = True

    theirs = score(model, LocalClassification())[0]
    ours = evaluate(encoder, config.Evaluation("e", "classification", write(tmp_path / "test.jsonl.gz", test),
                                               train_path=write(tmp_path / "train.jsonl", train), instruction="name it", max_length=LENGTH))
    assert 0.4 < ours["accuracy"] <= 1
    for name in ("accuracy", "f1", "f1_weighted", "precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_clustering_is_the_same_over_languages(model, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLES", 300)
    parts = {lang: labelled(90, seed) for lang, seed in (("deu", 5), ("eng", 6))}

    class LocalClustering(AbsTaskClustering):
        metadata = metadata("LocalClustering", "Clustering", "v_measure", {"deu": ["deu-Latn"], "eng": ["eng-Latn"]})
        max_fraction_of_documents_to_embed = None
        max_documents_per_cluster = 300

        def load_data(self, num_proc=None, **kwargs):
            self.dataset = {lang: DatasetDict(test=Dataset.from_dict({"sentences": [r["text"] for r in rows],
                                                                      "labels": [r["label"] for r in rows]}))
                            for lang, rows in parts.items()}
            self.data_loaded = True

    theirs = {found["hf_subset"]: found for found in score(model, LocalClustering())}
    rows = [r | {"lang": lang} for lang, part in parts.items() for r in part]
    ours = evaluate(encoder, config.Evaluation("e", "clustering", write(tmp_path / "c.jsonl", rows), max_length=LENGTH))
    for lang in parts:
        for name in ("v_measure", "v_measure_std", "ami"):
            assert ours[f"{name}/{lang}"] == pytest.approx(theirs[lang][name], abs=1e-6), (name, lang)


def test_bitext_mining_is_the_same(model, encoder, tmp_path):
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(50):
        words = rng.choice(WORDS, 6)
        rows.append({"sentence1": " ".join(words), "sentence2": " ".join([*words[:3], *rng.choice(WORDS, 2)])})

    class LocalBitext(AbsTaskBitextMining):
        metadata = metadata("LocalBitext", "BitextMining", "f1", {"deu-eng": ["deu-Latn", "eng-Latn"]})

        def load_data(self, num_proc=None, **kwargs):
            self.dataset = {"deu-eng": DatasetDict(test=Dataset.from_list(rows))}
            self.data_loaded = True

    theirs = score(model, LocalBitext())[0]
    ours = evaluate(encoder, config.Evaluation("e", "bitext", write(tmp_path / "b.jsonl", rows), max_length=LENGTH))
    assert 0.1 < ours["f1"] < 1
    for name in ("f1", "precision", "recall", "accuracy"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


class Task:
    def __init__(self, name, kind, prompt=None):
        self.name, self.type, self.prompt = name, kind, prompt


def test_prompts_follow_the_order_of_mteb(encoder):
    model, asked = MtebEncoder(encoder), MtebEncoder(encoder, task_instructions=True)
    assert model.prompt_for(Task("X", "Retrieval"), PromptType.query) == "Instruct: find it\nQuery: "
    for either in (model, asked):
        assert either.prompt_for(Task("X", "Retrieval"), PromptType.document) == ""
    assert model.prompt_for(Task("LocalSTS", "STS")) == "Instruct: compare\nQuery: "
    assert model.prompt_for(Task("Other", "STS")) == ""
    assert model.prompt_for(Task("Other", "Classification")) == "Instruct: name it\nQuery: "
    assert asked.prompt_for(Task("Other", "STS", "Retrieve alike text")) == "Instruct: Retrieve alike text\nQuery: "
    tasks = mteb.get_tasks(tasks=["SciFact", "STSBenchmark", "Banking77Classification"])
    assert prompt_map(model, tasks) == {"SciFact": {"query": "Instruct: find it\nQuery: ", "document": ""}, "STSBenchmark": {"text": ""},
                                        "Banking77Classification": {"text": "Instruct: name it\nQuery: "}}


def test_the_command_scores_tasks_of_mteb(encoder, tmp_path, monkeypatch):
    from mteb.mocks.mock_tasks import MockSTSTask

    monkeypatch.setattr(Encoder, "load", classmethod(lambda cls, folder: encoder))
    monkeypatch.setattr(mteb, "get_task", lambda name: MockSTSTask())
    app = Typer()
    app.command()(command)
    app.command("other")(lambda: None)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--mteb", "MockSTSTask", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "eval/mteb/mteb.json").read_text())
    assert found == json.loads(result.stdout[result.stdout.index("{"):]) and found["tasks"]["MockSTSTask"]["prompts"] == {"text": ""}
    scores = found["tasks"]["MockSTSTask"]["scores"]["test"][0]
    assert found["tasks"]["MockSTSTask"]["main_score"] == pytest.approx(scores["main_score"])


def test_a_task_that_is_not_here_is_named(model):
    with pytest.raises(ConfigError, match="no task 'NoSuchTask'"):
        evaluate_tasks(model, ["NoSuchTask"])
    with pytest.raises(DataError, match="data of the mteb task STSBenchmark is not on this machine"):
        evaluate_tasks(model, ["STSBenchmark"])
