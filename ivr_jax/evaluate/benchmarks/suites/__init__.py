"""One benchmark a module; each has a constant `BENCHMARK`.

    geneval, geneval2   objects, counts, colours, positions
    wise                world knowledge
    kris, rise          editing that needs knowledge or reasoning
    imgedit, gedit      editing
    omnicontext         subjects of reference images
    micro               held-out prompts of the micro-world
    own                 a user's own prompts
"""
