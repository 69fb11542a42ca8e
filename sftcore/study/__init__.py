"""Studies and reports: run folders -> tables, figures, one self-contained HTML page.

In: files that earlier stages left in a run folder. Out: report.html and report.json next to them.
Invariant: nothing here runs a model; a report can be made again, anywhere, from the folder alone.
Trade-off: the page carries its figures and styles inside (about 100 kB), so that it opens anywhere, offline.
"""
