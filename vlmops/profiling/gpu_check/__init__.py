"""`vlmops gpu-check`: is every kernel right on this GPU, and how fast is it beside what the GPU can do and what others do?

``cases`` says what is checked and timed, ``parity`` and ``timing`` do one case, ``workers`` runs them in processes of their own
(a kernel that faults takes its process along, not the run), ``run`` puts them in order within the time there is, ``report``
writes JSON and HTML.
"""
