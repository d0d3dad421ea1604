"""The tasks by name. Their classes are imported when one is asked for: some need packages that others do not."""

import importlib

# name → module of adaptlora.finetune.tasks : class in it
TASKS = {
    "classification": "classification:Classification",
    "regression": "classification:Regression",
    "causal-lm": "causal_lm:CausalLM",
    "seq2seq": "seq2seq:Seq2Seq",
    "question-answering": "question_answering:QuestionAnswering",
    "image-classification": "image_classification:ImageClassification",
    "object-detection": "object_detection:ObjectDetection",
    "clip-few-shot": "clip_few_shot:ClipFewShot",
    "subject-generation": "subject_generation:SubjectGeneration",
}


def task_class(name: str):
    """The class of a task, a subclass of adaptlora.finetune.tasks.Task. Raises: KeyError (no such task)."""
    module, kind = TASKS[name].split(":")
    return getattr(importlib.import_module(f".tasks.{module}", __package__), kind)
