"""A bundle over HTTP in the shapes of OpenAI's API, for ``molehill edge serve``. Needs the extra ``serve``.

`app` has the paths, `guard` who may call, `requests` what is asked, `replies` how it is answered, and `room` how many
are answered at once.
"""
