// Package routing says where a message goes and runs what receives it.
//
// A [Node] runs actors. An [Actor] is one [Address], a mailbox bounded in bytes and a [Worker] that handles one message
// at a time, in the order in which each sender sent them. An actor that has nothing to do is only a record and its slot
// in the node's table: it owns no goroutine and no queue. The first message starts a goroutine, which leaves when the
// mailbox is empty; the Go scheduler is the run queue.
//
// # Turns
//
// A call of Receive, of Drained, or of a function given to [Actor.Watch] is a turn of the actor. Turns never overlap and
// each sees all that the turn before it wrote, on whatever goroutine it ran. Stopped is the last turn. Turns run on
// goroutines of the actor's own, except Drained when [Actor.Run] finds the actor idle.
//
// # Sending
//
// [Actor.Post] never waits; [Actor.Send] waits for room in the mailbox; [Actor.Call] waits for an answer too. A message
// that was accepted belongs to its receiver. One that was not is still the sender's, unchanged. Toward the wire, Send;
// off the wire, Post: a reader that never waits for an actor cannot be part of a deadlock.
//
// Nothing is lost silently. What cannot be delivered now is an error of Post, Send or Call. What was accepted and can no
// longer be handled, because its actor stopped or dropped it, comes back to the first address of its return route as a
// message with Err set. An error is never answered by another one.
//
// An actor's own Send and Call know who waits, so a circle of actors that wait for one another is found and ends in
// [ErrCycle], and a waiting actor that is stopped stops waiting ([ErrStopped]).
//
// # Origin
//
// Routes that come from another node are hostile input. Whoever brings in a message from outside sets Message.Origin to
// what that peer has proved, and every actor refuses such a message unless its [Options.Guard] takes it. An origin stays
// on what the message causes: on the reply to it ([Actor.Reply]), on the report that it was not delivered, and on itself
// when it is sent on. So a peer cannot reach, through a return route of its choosing, an actor whose guard would refuse
// it. A message with an origin is never given to [Node.Remote].
//
// # Wire format
//
//	route    u8 count (≤ 16) ‖ count × ( u8 length (1..64) ‖ address ), ≤ 1,024 bytes in all
//	message  u8 kind ‖ u8 hops (≤ 8) ‖ onward route ‖ return route ‖ rest
//	         kind 0: rest is the body
//	         kind 1: undelivered; rest begins with u8 reason: 1 no actor, 2 full, 3 cycle, 4 refused, 5 unreachable,
//	                 6 timeout, 7 stopped; an unknown one is read as 5, what follows it is ignored
//
// Each route has exactly one encoding.
package routing
