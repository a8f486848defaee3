// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// FolderReady is what a process says that has mounted a folder.
const FolderReady = "ok\n"

// helperDir is where an agent is put that the guest does not carry: in memory, so that
// it is no part of the machine's disk.
const helperDir = "/run/lab-agent"

// helperScript puts it there. A /run may be one that nothing is run from, so the folder
// has a file system of its own.
const helperScript = `set -e
grep -q " $0 tmpfs " /proc/mounts || { mkdir -p "$0" && mount -t tmpfs -o mode=0700,size=32m,nosuid,nodev,exec lab-agent "$0"; }
cat >"$1.$$" && chmod 0700 "$1.$$" && mv "$1.$$" "$1"
`

// MountFolder makes a guest without an agent mount a folder of the host, over ssh and
// by a copy of lab-agent that it is handed. The host is to be the sftp server of what
// it returns, which ends with the login. The user must be root, or become it by sudo.
//
// Errors: *RefusedError if the guest cannot mount it, and those of Connect.
func MountFolder(ctx context.Context, t Target, agent []byte, f agentapi.Folder) (io.ReadWriteCloser, error) {
	c, err := Connect(ctx, t)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	conn, err := c.mountFolder(ctx, t, agent, f)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return conn, nil
}

func (c *Client) mountFolder(ctx context.Context, t Target, agent []byte, f agentapi.Folder) (io.ReadWriteCloser, error) {
	var root []string
	if t.User != "root" {
		root = []string{"sudo", "-n"}
	}
	helper := fmt.Sprintf("%s/%x", helperDir, sha256.Sum256(agent))
	var exit *ExitError
	err := c.Run(ctx, Command{Args: append(root[:len(root):len(root)], "test", "-x", helper)})
	if errors.As(err, &exit) {
		var said bytes.Buffer
		err = c.Run(ctx, Command{
			Args:  append(root[:len(root):len(root)], "sh", "-c", helperScript, helperDir, helper),
			Stdin: bytes.NewReader(agent), Stderr: &said,
		})
		if errors.As(err, &exit) {
			why := strings.TrimSpace(said.String())
			return nil, &RefusedError{What: string(agentapi.Mount), Reason: fmt.Sprintf("user %q cannot start what mounts it, as root: %s", t.User, why)}
		}
	}
	if err != nil {
		return nil, err
	}
	spec, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	s, err := c.ssh.NewSession()
	if err != nil {
		return nil, err
	}
	in, err := s.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := s.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.Start(Quote(append(root, helper, "mount", string(spec)))); err != nil {
		return nil, fmt.Errorf("starting a command: %w", lost(err))
	}
	r := bufio.NewReader(out)
	line, err := r.ReadSlice('\n') // no longer than r's buffer
	switch {
	case err != nil:
		return nil, fmt.Errorf("mounting %s: %w", f.Path, lost(err))
	case string(line) != FolderReady:
		return nil, &RefusedError{What: string(agentapi.Mount), Reason: strings.TrimSpace(string(line))}
	}
	return &folderConn{Reader: r, WriteCloser: in, login: c}, nil
}

// folderConn is the input and output of a command, and ends its login.
type folderConn struct {
	io.Reader
	io.WriteCloser
	login *Client
}

func (c *folderConn) Close() error { return c.login.Close() }
