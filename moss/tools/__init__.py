"""What the model can do besides talking: the tools, how its commands are read, how they run, what comes back.

`base` is the frame of a tool, `calls` reads a line of commands and runs it, `run` is the one turn loop, `events` what
it tells, `chat_server` the same for models on servers. `calculator`, `solver` and `search` are tools, `sandbox` is
where they do what is dangerous; `own` finds those of a user's file, `mcp` those of MCP servers. `command` is `moss
tool`, `mcp_server` its `--serve-mcp`. From plain Python:

    from moss.tools.calculator import calculate
    calculate("37*12")                                   # '444'
"""
