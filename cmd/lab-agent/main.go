// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command lab-agent runs inside a guest and is its side of what lab does there:
// identity, control and an ssh server, all over one virtio-serial port.
//
//	lab-agent            serve the port, until killed
//	lab-agent sftp       serve sftp on standard input and output
//	lab-agent files      copy files and folders: see filestream.Serve
//	lab-agent volumes    mount the volumes that the kernel's command line names
//	lab-agent folder …   mount a folder of the host: the agent itself calls this
//	lab-agent mount …    the same in a guest without the agent, over standard input and output
//	lab-agent version    print the version
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/labfile/lab/internal/guest/agent"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/filestream"
	"github.com/labfile/lab/internal/guest/hostfs"
	"github.com/labfile/lab/internal/guest/sshd"
)

// version is set by the linker.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "lab-agent: error: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	word := ""
	if len(args) > 0 {
		word = args[0]
	}
	switch {
	case len(args) == 0:
		return serve(ctx)
	case len(args) == 1 && word == "sftp":
		return sshd.ServeSFTP(os.Stdin, os.Stdout)
	case len(args) == 1 && word == "files":
		return filestream.Serve(ctx, os.Stdin, os.Stdout)
	case len(args) == 1 && word == "volumes":
		syscall.Umask(0o022)
		return agent.Kernel{}.MountVolumes()
	case len(args) == 2 && word == "folder":
		return hostfs.Main(ctx, args[1])
	case len(args) == 2 && word == "mount":
		return mount(args[1])
	case len(args) == 1 && word == "version":
		_, err := fmt.Println("lab-agent", version)
		return err
	}
	return fmt.Errorf("unknown arguments %q; usage: lab-agent [sftp|files|volumes|folder CONFIG|mount CONFIG|version]", args)
}

// mount outlives the login that started it.
func mount(folder string) error {
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	_, _ = syscall.Setsid()
	var f agentapi.Folder
	if err := json.Unmarshal([]byte(folder), &f); err != nil {
		return err
	}
	root, err := os.OpenRoot("/")
	if err != nil {
		return err
	}
	defer root.Close()
	a := &agent.Agent{Version: version, Root: root}
	return a.MountFolder(os.Stdin, os.Stdout, f)
}

func serve(ctx context.Context) error {
	// What starts us early in the boot may have left anything here.
	syscall.Umask(0o022)
	if err := os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"); err != nil {
		return err
	}
	// Not to be ignored outright: the sessions' processes would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	root, err := os.OpenRoot("/")
	if err != nil {
		return err
	}
	defer root.Close()
	a := &agent.Agent{
		Version: version,
		Root:    root,
		Machine: agent.Kernel{},
		SFTP:    []string{self, "sftp"},
		Files:   []string{self, "files"},
		Folders: []string{self, "folder"},
		Log:     slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if err := a.Restore(); err != nil {
		a.Log.Error("the kept identity was not restored", "error", err)
	}
	err = a.Serve(ctx, func(ctx context.Context) (*os.File, error) {
		return agent.OpenPort(ctx, agentapi.Port)
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
