package store

// SelectRunsByID is the statement of ListRunsByID, for a look at its plan.
const SelectRunsByID = selectRunsByID
