"""Tandem's router: the OpenAI API in text on one side, workers that deal in tokens on the other.

A request goes api (validate, template, tokenize) -> dispatch (choose workers, submit, fail over)
-> workers (one connection each) and its tokens come back as api (detokenize, stop strings, SSE).
"""
