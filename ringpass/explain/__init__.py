"""explain: what the backend would make of a model on P ranks, as a report; no process, no GPU, no memory for the model.

    run        `explain`: the public function
    fake       the model and its inputs as fake tensors, run through Dynamo
    stages     the explaining backend: the stages of a real run, up to the lowered graphs of one rank
    facts      plan and program -> the data of the report; `sites`, `schedules`, `traffic`, `memory` do parts of it
    verdict    what a reader must see first; the devices that a peak is held against
    longest    the largest length that fits
    making     the report of a call, or of the graphs of a real run
    report     the report; `data`: its parts, frozen dataclasses; `to_dict`, JSON
    difference two reports compared
    tables     a report as tables, for a terminal and a notebook
    command    the command line

Contract: the report is made of the same plan and program as a real run (`ringpass.rank_program`), never of copies.
"""
