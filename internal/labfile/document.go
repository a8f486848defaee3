// SPDX-License-Identifier: Apache-2.0

package labfile

// The types below are the Labfile as it is written. Their tags are the one
// source of the parser, of the JSON schema and of the tables in docs/labfile.md.

// document is a Labfile.
type document struct {
	Lab      text             `yaml:"lab" need:"shop" form:"label" also:"name" doc:"Name of the lab: lower-case letters, digits and hyphens. --name replaces it, for a second lab from the same Labfile."`
	Provider text             `yaml:"provider" form:"label" default:"qemu" doc:"What runs the machines: qemu or libvirt. --provider replaces it."`
	URI      text             `yaml:"uri" example:"qemu:///session" also:"url connection" doc:"With provider: libvirt, the daemon that runs the machines, as libvirt writes it. Without it, the calling user's own, qemu:///session. --uri replaces it."`
	Network  text             `yaml:"network" oneof:"auto switch nat isolated" default:"auto" also:"networks net" doc:"What connects the machines: the lab's own switch alone, or besides it a network that libvirt makes where they run. By that they reach one another without the way through this host and, with nat, the world outside too. nat and isolated need provider: libvirt, with a system's daemon; auto is isolated there, for boxes with lab-agent, and switch elsewhere."`
	Boxes    table[boxEntry]  `yaml:"boxes" example:"base: builtin/debian-12" also:"images" doc:"Images under names of your own, for machines to share."`
	Machines table[roleEntry] `yaml:"machines" need:"{web: {box: builtin/tiny}}" example:"web: {box: builtin/tiny}" also:"vms services nodes hosts" doc:"The machines of the lab, by name."`
	Expires  duration         `yaml:"expires" range:"1s..87600h" also:"ttl lifetime expiry" doc:"So long after its first lab up the lab is destroyed; its volumes are kept. Without it, never."`

	Expose list[exposeEntry] `yaml:"expose" example:"{name: api, port: 9000}" also:"exposes host_ports" doc:"TCP ports of this host's loopback that the machines reach as NAME:PORT. Without it, none."`

	Proxy text `yaml:"proxy" oneof:"none inherit" default:"none" also:"http_proxy proxies" doc:"inherit: guests get the proxy settings of this host's environment, in bakes too."`

	Checks list[testEntry] `yaml:"checks" example:"{on: web, port: 80}" also:"tests test verify goss" doc:"What must hold of the machines, for lab verify and for every new generation."`
}

// exposeEntry is an item of expose.
type exposeEntry struct {
	place
	Name text    `yaml:"name" need:"api" form:"label" also:"host as" doc:"The name by which machines reach this host: a name that no machine has."`
	Port integer `yaml:"port" need:"9000" range:"1..65535" also:"host_port" doc:"The port, on 127.0.0.1 or ::1 of this host, and under the name."`
}

// boxEntry is an entry of boxes.
type boxEntry struct {
	place
	From     text `yaml:"from" need:"builtin/debian-12" short:"yes" also:"image url source path" doc:"Where the box comes from. A box can be written as just this: base: builtin/debian-12."`
	Checksum text `yaml:"checksum" also:"sha256 sha512 digest" doc:"What the file must hash to: sha256:HEX, sha512:HEX, the bare HEX of either, or file: and the URL or path of a file of sums, in the forms of sha256sum and openssl. Not for built-in boxes."`
}

// roleEntry is an entry of machines: one machine, or several that are alike.
type roleEntry struct {
	place
	Box       text          `yaml:"box" need:"builtin/tiny" also:"image from" doc:"What the machine is born from: a name from boxes, or directly builtin/NAME, an http(s) URL or a path."`
	Count     integer       `yaml:"count" range:"1..100" also:"replicas instances scale" doc:"Makes so many machines that are alike, called NAME-1, NAME-2 and so on. Without it there is one, called NAME."`
	CPUs      integer       `yaml:"cpus" range:"1..64" default:"1" also:"cpu vcpu vcpus cores" doc:"Virtual processors."`
	Memory    size          `yaml:"memory" range:"16MiB..4TiB" default:"512MiB; 128MiB for builtin/tiny" also:"ram mem" doc:"Memory, in whole MiB."`
	Disk      size          `yaml:"disk" range:"1MiB..16TiB" default:"the size of the box" also:"size" doc:"Virtual size of the root disk, in whole MiB; the file system grows to it where the box knows how. It takes only the space that the machine writes. It cannot be smaller than the box."`
	Address   integer       `yaml:"address" range:"10..250" also:"ip host" doc:"Last number of the machine's address in the lab's network, for as long as it lives. Without it, one that is free. Not with count."`
	DependsOn list[text]    `yaml:"depends_on" example:"db" also:"dependson requires after needs" doc:"Machines that must be ready before this one starts. NAME means every replica of NAME."`
	Ports     list[forward] `yaml:"ports" example:"\"8080:80\"" also:"port forward forwards" doc:"Guest ports to make reachable on the host's 127.0.0.1."`
	Ready     list[check]   `yaml:"ready" example:"{port: 80}" also:"healthcheck health wait checks" doc:"What must hold before the machine counts as ready."`
	User      text          `yaml:"user" form:"user" default:"the user of the box" also:"username login ssh_user" doc:"Whom to log in as. A cloud image has root without it; whom it names, cloud-init makes, with sudo."`
	UserData  userData      `yaml:"user_data" guest:"text" also:"userdata cloud_init cloudinit" doc:"User data for cloud-init, where the box has it: #cloud-config, a script that begins with #!, or any other of its formats. It is merged with what lab itself needs."`

	Provision list[stepEntry]   `yaml:"provision" example:"{shell: apt-get install -y nginx}" also:"provisioners setup install" doc:"Steps that are baked into an image once, from which the machines are born."`
	Boot      list[bootEntry]   `yaml:"boot" example:"{shell: ./join.sh}" also:"on_boot first_boot firstboot bootstrap runcmd bootcmd init" doc:"Steps that each generation of the machine runs once, at its first boot, before its ready checks."`
	Volumes   list[volumeEntry] `yaml:"volumes" example:"{name: data, size: 1GiB, mount: /srv/data}" also:"disks data" doc:"Data that outlives the generations of the machine."`
	Mounts    list[mountEntry]  `yaml:"mounts" example:"\"./src:/src\"" also:"mount shares synced_folder synced_folders folders" doc:"Folders of this host that the machine sees, read-only unless they are writable."`
	Replace   replaceEntry      `yaml:"replace" also:"update strategy deploy" doc:"How a generation of the machine gives way to the next one."`
	OnShell   text              `yaml:"on_shell" oneof:"allow warn taint forbid" default:"allow" also:"onshell shell_policy" doc:"What lab ssh, exec, cp and console do to the machine; each use is recorded. warn tells the user; taint makes the next lab up replace the machine; forbid refuses."`
	MaxAge    ageEntry          `yaml:"max_age" also:"maxage ttl lifetime expires" doc:"How old a generation may become. It is replaced then, or what then says."`
	Idle      idleEntry         `yaml:"idle" also:"idle_timeout autostop" doc:"How long the machine may go unused: no connection through a forwarded port, no command by hand. It is stopped then, or what then says."`
}

// check is an item of ready. It has one kind, and its timing.
type check struct {
	place
	SSH     sshCheck     `yaml:"ssh" empty:"ok" doc:"A login over ssh, to the guest's own port 22, succeeds. Write ssh alone, or ssh: {}."`
	Port    portCheck    `yaml:"port" also:"tcp" doc:"The guest accepts connections to the TCP port."`
	HTTP    httpCheck    `yaml:"http" also:"url get" doc:"A GET request is answered with the wanted status."`
	Exec    execCheck    `yaml:"exec" also:"shell cmd command run" doc:"The command, run by the guest's shell, exits with 0."`
	Console consoleCheck `yaml:"console" also:"log serial" doc:"What the console printed since the start matches the regular expression."`
	timing
}

func (*check) alternatives() []string {
	return []string{"ssh", "port", "http", "exec", "console"}
}

// parseBare lets ssh, which has nothing to set, stand alone.
func (c *check) parseBare(word string, at place) bool {
	if word != "ssh" {
		return false
	}
	c.SSH.locate(at)
	return true
}

// timing says how long, and how often, a check is tried. It stands beside the
// kind; inside of the kind's mapping it is understood too.
type timing struct {
	Timeout  duration `yaml:"timeout" range:"1s..24h" default:"3m" also:"within deadline" doc:"How long to go on trying. When it is over, the machine counts as failed; it is kept, to be looked at."`
	Interval duration `yaml:"interval" range:"10ms..1h" default:"250ms" also:"every period" doc:"Pause between two tries."`
}

type sshCheck struct {
	place
	timing
}

type portCheck struct {
	place
	Port integer `yaml:"port" need:"5432" short:"yes" range:"1..65535" doc:"TCP port of the guest."`
	timing
}

type httpCheck struct {
	place
	Port   integer `yaml:"port" need:"80" short:"yes" range:"1..65535" doc:"TCP port of the guest."`
	Path   text    `yaml:"path" default:"/" also:"url uri" doc:"Path of the request, with its query if it has one."`
	Status integer `yaml:"status" range:"100..599" default:"any from 200 to 399" also:"code" doc:"Status that the answer must have."`
	timing
}

type execCheck struct {
	place
	Run text `yaml:"run" guest:"text" need:"pg_isready" short:"yes" also:"command cmd shell" doc:"The command line."`
	timing
}

type consoleCheck struct {
	place
	Match text `yaml:"match" need:"login:" short:"yes" also:"regexp regex pattern" doc:"Regular expression in RE2 syntax; (?m) lets ^ and $ match at lines."`
	timing
}
