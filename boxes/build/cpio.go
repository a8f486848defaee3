// SPDX-License-Identifier: Apache-2.0

package build

import (
	"fmt"
	"io"
)

// cpioWriter writes a cpio archive in the "newc" format, the one that Linux
// unpacks as its initial root file system (Documentation/driver-api/early-userspace/buffer-format.rst).
// Everything belongs to root and has the time epoch.
type cpioWriter struct {
	w   io.Writer
	ino int
	n   int64 // bytes written
	err error
}

func (c *cpioWriter) write(p []byte) {
	if c.err == nil {
		var n int
		n, c.err = c.w.Write(p)
		c.n += int64(n)
	}
}

// pad fills up to a multiple of four bytes.
func (c *cpioWriter) pad() { c.write(make([]byte, -c.n&3)) }

// entry writes one file; mode has the type bits of stat(2).
func (c *cpioWriter) entry(name string, mode uint32, content []byte) {
	c.ino++
	links := 1
	if mode&0o170000 == 0o040000 {
		links = 2
	}
	c.header(c.ino, mode, links, epoch, len(content), 0, 0, name)
	c.write(content)
	c.pad()
}

func (c *cpioWriter) dir(name string)                      { c.entry(name, 0o040755, nil) }
func (c *cpioWriter) file(name string, m uint32, b []byte) { c.entry(name, 0o100000|m, b) }
func (c *cpioWriter) link(name, target string)             { c.entry(name, 0o120777, []byte(target)) }

// char writes a character device.
func (c *cpioWriter) char(name string, mode uint32, major, minor int) {
	c.ino++
	c.header(c.ino, 0o020000|mode, 1, epoch, 0, major, minor, name)
}

func (c *cpioWriter) header(ino int, mode uint32, links, mtime, size, major, minor int, name string) {
	c.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		ino, mode, 0, 0, links, mtime, size, 0, 0, major, minor, len(name)+1, 0, name))
	c.pad()
}

// close ends the archive.
func (c *cpioWriter) close() error {
	c.header(0, 0, 1, 0, 0, 0, 0, "TRAILER!!!")
	return c.err
}
