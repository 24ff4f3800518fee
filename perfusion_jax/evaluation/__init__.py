"""How well learnt concepts are drawn: pictures, scores with intervals, fronts, and a report of them."""
