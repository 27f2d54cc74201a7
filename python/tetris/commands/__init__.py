"""Commands of ``tetris``, one module each: ``add_parser(commands)`` and ``run(args)``."""
