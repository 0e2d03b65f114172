"""What the model can do besides talking: the tools, how its commands are read, how they run, what comes back.

`base` is the frame (a tool, a command, an outcome), `calculator` and `solver` are tools, `sandbox` is where both do
their work, `run` is the one turn loop, `command` is `moss tool`. From plain Python:

    from moss.tools.calculator import calculate
    calculate("37*12")                                   # '444'
"""
