"""The language-model part of ``quantrain finetune``: models, texts and the job."""
