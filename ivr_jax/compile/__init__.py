"""Ahead-of-time TPU compilation without a TPU: memory, schedule and an estimate of time.

    topologies.py           TPU topologies by name, and what is published of their chips
    programs.py             the step functions with the shapes and shardings of a config; nothing is allocated
    rl_programs.py          those of an rl config; sampling_programs.py: those of the rollout engine
    worker.py               compiles one program in a process of its own; jobs.py: runs the workers
    hlo.py                  reads a compiled program
    memory.py               what is in a chip's memory, from the compiler's buffer assignment
    roofline.py             an estimate of a program's time, from its schedule
    flops.py                operations of a traced program
    predict.py              memory and time by arithmetic; search.py: the fastest configs that fit
    advice.py               what to change of a config that does not fit
    report.py               tables
"""
