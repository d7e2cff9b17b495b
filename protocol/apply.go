package protocol

// Apply makes the message that runs the signature (contract 4.2): arguments
// merged, options mapped to headers, properties and embed. Exchange and
// RoutingKey are left to the worker's routes, which start from the
// Destination.
//
// Options that are malformed are an error: a *MalformedError for the new task.
func (s Signature) Apply(o ApplyOptions) (Publishing, Destination, error) { return s.apply(o) }
