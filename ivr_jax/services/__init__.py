"""Clients of remote services behind the interfaces `Analyzer` and `Generator`.

    config.py           settings of one service; keys from environment variables
    caller.py           one call: limits, retries, circuit breaker, time-outs
    replies.py          from a model's text to checked values: the one reader of answers
    prompts.py          the prompts, one file each, with versions
    http_client.py      what every HTTP client shares: images, errors, replies
    openai_client.py    the OpenAI protocol: chat with images, images generated and edited
    gateway_client.py   the gateway of the released scripts, with HMAC-signed headers
    service.py          a client behind a caller, every answer recorded
    journal.py          the records, on disk
    analyzer.py         ServiceAnalyzer
    generator.py        ServiceGenerator
    checkpoint.py       a local model as the generator
    build.py            from a config to an analyzer and a generator
"""
