"""Stage 1: Dynamo's graph -> functional pre-dispatch ATen."""
