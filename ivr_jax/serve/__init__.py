"""A server of one or several models (`python -m ivr_jax.serve`): a page that shows answers while they are generated,
and OpenAI's protocol.

    limits          how large and how long requests may be
    partial_answer  tokens so far -> the parts of an answer; edited parts -> tokens to continue from
    uploads         images that users have sent, in memory
    jobs            one request on its way: state, parts, who watches it
    models          a loaded model with what its requests need
    scheduler       the engine thread: queue, slots of the rollout engine, segments, previews
    archive         finished answers on disk, for permalinks and downloads
    guard           who may call: host, origin, token
    page_routes     the page and its JSON and event-stream interface
    openai_routes   /v1/...
    telemetry       /metrics
    app             all of it as one ASGI application
"""
