"""Clients of remote services behind the interfaces `Analyzer` and `Generator`.

    config.py           settings of one service; keys from environment variables
    caller.py           one call: limits, retries, circuit breaker, time-outs
    replies.py          from a model's text to checked values: the one reader of answers
    prompts.py          the prompts, one file each, with versions
    transport.py        what every protocol shares: images, errors, replies
    openai_protocol.py  the OpenAI protocol: chat with images, images generated and edited
    gateway.py          the gateway of the released scripts, with HMAC-signed headers
    service.py          a transport behind a caller, every answer recorded
    journal.py          the records, on disk
    analyzer.py         ServiceAnalyzer
    generator.py        ServiceGenerator
    checkpoint.py       a local model as the generator
    build.py            from a config to an analyzer and a generator
"""
