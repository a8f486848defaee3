// SPDX-License-Identifier: Apache-2.0

package agentapi

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Folder is a folder of the host that the guest is to mount. The stream's host end
// is its sftp server.
type Folder struct {
	Path     string `json:"path"` // absolute, in the guest
	Writable bool   `json:"writable,omitempty"`
	Owner    string `json:"owner"` // to whom everything in it belongs: "user:group", "user", or numbers
	Source   string `json:"source,omitempty"`
}

// sftp (version 3) has seconds only, no inode numbers and few errors. What follows is
// how both sides say more to each other; any other client or server passes over it.

// The extended attributes.
const (
	AttrName  = "attr@labfile.dev"  // of every file that the host tells of: an Attr
	TimesName = "times@labfile.dev" // with a setstat request: Times
)

// Attr is what sftp does not tell of a file.
type Attr struct {
	Dev, Ino, Nlink, Blocks uint64
	Atime, Mtime, Ctime     time.Time
}

// String is how the attribute is sent.
func (a Attr) String() string {
	return fmt.Sprintf("%d %d %d %d %d %d %d", a.Dev, a.Ino, a.Nlink, a.Blocks, a.Atime.UnixNano(), a.Mtime.UnixNano(), a.Ctime.UnixNano())
}

// ParseAttr reads what Attr.String wrote.
func ParseAttr(s string) (Attr, error) {
	var (
		a       Attr
		at, mt  int64
		ct      int64
		_, serr = fmt.Sscanf(s, "%d %d %d %d %d %d %d", &a.Dev, &a.Ino, &a.Nlink, &a.Blocks, &at, &mt, &ct)
	)
	a.Atime, a.Mtime, a.Ctime = time.Unix(0, at), time.Unix(0, mt), time.Unix(0, ct)
	return a, serr
}

// Times are the times that a file is to get; zero leaves one as it is.
type Times struct{ Atime, Mtime time.Time }

// String is how the times are sent.
func (t Times) String() string {
	word := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return strconv.FormatInt(t.UnixNano(), 10)
	}
	return word(t.Atime) + " " + word(t.Mtime)
}

// ParseTimes reads what Times.String wrote.
func ParseTimes(s string) (Times, error) {
	a, m, ok := strings.Cut(s, " ")
	if !ok {
		return Times{}, fmt.Errorf("%q are not times", s)
	}
	parse := func(s string) (time.Time, error) {
		if s == "-" {
			return time.Time{}, nil
		}
		n, err := strconv.ParseInt(s, 10, 64)
		return time.Unix(0, n), err
	}
	at, aerr := parse(a)
	mt, merr := parse(m)
	return Times{at, mt}, errors.Join(aerr, merr)
}

// FolderError is an error of the host's with the number that Linux has for it.
type FolderError struct{ Errno syscall.Errno }

const errnoPrefix = "errno "

func (e *FolderError) Error() string {
	return errnoPrefix + strconv.Itoa(int(e.Errno)) + ": " + e.Errno.Error()
}

// Errno finds the number in the message of an error that came over the wire.
func Errno(message string) (syscall.Errno, bool) {
	_, rest, ok := strings.Cut(message, errnoPrefix)
	if !ok {
		return 0, false
	}
	digits, _, _ := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(digits, 10, 12)
	return syscall.Errno(n), err == nil && n > 0
}
