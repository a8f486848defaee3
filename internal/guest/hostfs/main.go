// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ControlFD is where a process that mounts a folder finds its end of a unix socket. It
// gets its connections to the host there, each with one byte that says what for, and says one line:
// "ok" when the folder is mounted, or why it is not.
const ControlFD = 3

// OK is that line.
const OK = "ok\n"

// Main mounts a folder, says so, and serves it until the other end of the control
// socket is closed, or ctx ends. The folder has a process of its own because the agent starts
// programs, whose first steps may need files of the folder.
func Main(ctx context.Context, config string) error {
	file := os.NewFile(ControlFD, "control")
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		return fmt.Errorf("finding the control socket: %w", err)
	}
	defer conn.Close()
	control, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.New("finding the control socket: it is another kind of socket")
	}
	defer context.AfterFunc(ctx, func() { control.Close() })()
	var c Config
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return fmt.Errorf("reading what to mount: %w", err)
	}
	f, err := Mount(c)
	if err != nil {
		_, _ = io.WriteString(control, err.Error()+"\n")
		return err
	}
	defer f.Close()
	if _, err := io.WriteString(control, OK); err != nil {
		return err
	}
	for {
		conn, what, err := receive(control)
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("waiting for a connection: %w", err)
		}
		serve := f.Serve
		if what == ForCache {
			serve = f.ServeCache
		}
		go func() { _ = serve(conn) }()
	}
}

// What a connection is for.
const (
	ForFiles byte = 0 // sftp
	ForCache byte = 1 // foldercache
)

// Send hands a connection to such a process.
func Send(control *net.UnixConn, conn *os.File, what byte) error {
	_, _, err := control.WriteMsgUnix([]byte{what}, unix.UnixRights(int(conn.Fd())), nil)
	return err
}

func receive(control *net.UnixConn) (net.Conn, byte, error) {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := control.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, 0, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, 0, err
	}
	if len(messages) != 1 {
		return nil, 0, errors.New("a message without a connection")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, 0, err
	}
	if len(fds) != 1 {
		return nil, 0, errors.New("a message without a connection")
	}
	syscall.CloseOnExec(fds[0])
	file := os.NewFile(uintptr(fds[0]), "host")
	defer file.Close()
	c, err := net.FileConn(file)
	return c, b[0], err
}
