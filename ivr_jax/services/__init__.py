"""Clients for real services behind the `Analyzer` and `Generator` interfaces.

    config.py      the settings of one service, checked; where its key comes from
    caller.py      one careful call: limits, retries, circuit breaker, time-outs
    replies.py     from a model's text to checked values, however it was written
    prompts.py     the prompts, one file each, with their versions
    transport.py   what a transport is, and images on the wire
    openai.py      the OpenAI protocol: chat with images, images generated and edited
    gateway.py     the released scripts' gateway, with HMAC-signed headers
    analyzer.py    ServiceAnalyzer
    generator.py   ServiceGenerator
    checkpoint.py  a model of our own as the generator
    build.py       from a config to an analyzer and a generator
"""
