"""Who holds a model: processes (vLLM engine, DeepSpeed worker, scorer) and the mathematics that they run.

Actors know token ids and tensors. They know neither stages nor the order of a job.
"""
