"""Paths in buckets, gs:// and s3://, for every command.

A command works on local files.  What it reads from a bucket is fetched into a cache (`inputs`); a folder in a bucket
that it writes is a local folder that is copied there (`mirror`, with a `manifest`), by one writer at a time (`lease`),
all through `objects`.  The bucket shows the state of the last complete copy, whatever is interrupted.  Checkpoints of a
work directory in gs:// are the exception: Orbax writes them there itself, shard by shard, from every process.
"""
