package stream

// Window is what the stream may have on its way to this end.
func (c *Conn) Window() int {
	c.recv.Lock()
	defer c.recv.Unlock()
	return c.window
}

// StarvedFor is how long Join waits for credit before it looks whether it was reset.
const StarvedFor = starvedFor
