"""What a warm start is worth on real tables, with sites that lie.

Each of HPOBench's eight data sets is left out in turn. The sites that have the other seven tune an MLP and
emit what they found to cohorts on a real server; under an attack two more sites lie. A newcomer with the data
set left out asks for a warm start, and its search is compared with cold ones from the same draws.

The searches, the sites' budget, the attacks, the target (the median error of a cold search after 25
evaluations) and the ratio of mean evaluations as the headline were fixed before any arm was measured.
Keep it so: what is changed to make a number better here says nothing elsewhere.
"""
