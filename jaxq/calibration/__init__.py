"""The parts of `jaxq.calibrate`: the walk over the program, and what goes on at each group of contractions.

| module      | what                                                                                      |
|-------------|-------------------------------------------------------------------------------------------|
| stages      | the pieces of program between the groups, known before any is run                         |
| walk        | the program evaluated piece by piece on the batches, every group handled as it is reached |
| handle      | one group: what its steps need, the steps, the fold and its proof                         |
| pieces      | the pieces of program in which a group's error is measured                                |
| ahead       | compilation while the walk goes on                                                        |
| resume      | finished groups on disk, from which an interrupted calibration goes on                    |
| fingerprint | by which it knows that it was given the same                                              |
"""
