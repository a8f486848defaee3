// SPDX-License-Identifier: Apache-2.0

package providertest

// What the guest of BootDisk prints when it has booted, and what it does when
// one of the keys is typed at its console. Any other key is echoed.
const (
	Banner   = "lab test disk"
	KeyOff   = "q" // powers off
	KeyPanic = "p" // reports a kernel panic through pvpanic
	KeyReset = "r" // resets the machine
)

// BootDisk returns a raw disk of 1 MiB whose boot sector is a whole guest: it
// prints Banner on the first serial port and obeys the keys. It boots from BIOS
// on a PC with PIIX4 power management in a fraction of a second, even emulated.
// A deaf one ignores the power button.
func BootDisk(deaf bool) []byte {
	code := []byte{
		0xfa,       // 7c00 cli
		0x31, 0xc0, // 7c01 xor ax, ax
		0x8e, 0xd8, // 7c03 mov ds, ax
		0x8e, 0xd0, // 7c05 mov ss, ax
		0xbc, 0x00, 0x7c, // 7c07 mov sp, 0x7c00
		0xea, 0x0f, 0x7c, 0x00, 0x00, // 7c0a jmp 0:0x7c0f
		0xba, 0x02, 0x06, // 7c0f mov dx, 0x602: power management, enable
		0xb8, 0x00, 0x01, // 7c12 mov ax, 0x100: the power button
		0xef,             // 7c15 out dx, ax
		0xbe, 0x79, 0x7c, // 7c16 mov si, 0x7c79: the banner
		0xac,       // 7c19 lodsb
		0x84, 0xc0, // 7c1a test al, al
		0x74, 0x05, // 7c1c jz 7c23
		0xe8, 0x47, 0x00, // 7c1e call 7c68
		0xeb, 0xf6, // 7c21 jmp 7c19
		0xfb,             // 7c23 sti
		0xf4,             // 7c24 hlt: the next timer tick wakes it
		0xfa,             // 7c25 cli
		0xba, 0x00, 0x06, // 7c26 mov dx, 0x600: power management, status
		0xed,             // 7c29 in ax, dx
		0xf6, 0xc4, 0x01, // 7c2a test ah, 1: the power button was pressed
		0x75, 0x1d, // 7c2d jnz 7c4c
		0xba, 0xfd, 0x03, // 7c2f mov dx, 0x3fd: line status
		0xec,       // 7c32 in al, dx
		0xa8, 0x01, // 7c33 test al, 1: a byte has come
		0x74, 0xec, // 7c35 jz 7c23
		0xba, 0xf8, 0x03, // 7c37 mov dx, 0x3f8: data
		0xec,       // 7c3a in al, dx
		0x3c, 0x71, // 7c3b cmp al, 'q'
		0x74, 0x0d, // 7c3d je 7c4c
		0x3c, 0x70, // 7c3f cmp al, 'p'
		0x74, 0x13, // 7c41 je 7c56
		0x3c, 0x72, // 7c43 cmp al, 'r'
		0x74, 0x18, // 7c45 je 7c5f
		0xe8, 0x1e, 0x00, // 7c47 call 7c68
		0xeb, 0xd7, // 7c4a jmp 7c23
		0xba, 0x04, 0x06, // 7c4c mov dx, 0x604: power management, control
		0xb8, 0x00, 0x20, // 7c4f mov ax, 0x2000: sleep type 0, power off
		0xef,       // 7c52 out dx, ax
		0xf4,       // 7c53 hlt
		0xeb, 0xfd, // 7c54 jmp 7c53
		0xba, 0x05, 0x05, // 7c56 mov dx, 0x505: pvpanic
		0xb0, 0x01, // 7c59 mov al, 1: panicked
		0xee,       // 7c5b out dx, al
		0xf4,       // 7c5c hlt
		0xeb, 0xfd, // 7c5d jmp 7c5c
		0xb0, 0x06, // 7c5f mov al, 6: hard reset
		0xba, 0xf9, 0x0c, // 7c61 mov dx, 0xcf9: reset control
		0xee,       // 7c64 out dx, al
		0xf4,       // 7c65 hlt
		0xeb, 0xfd, // 7c66 jmp 7c65
		0x88, 0xc3, // 7c68 mov bl, al
		0xba, 0xfd, 0x03, // 7c6a mov dx, 0x3fd
		0xec,       // 7c6d in al, dx
		0xa8, 0x20, // 7c6e test al, 0x20: room for a byte
		0x74, 0xfb, // 7c70 jz 7c6d
		0xba, 0xf8, 0x03, // 7c72 mov dx, 0x3f8
		0x88, 0xd8, // 7c75 mov al, bl
		0xee, // 7c77 out dx, al
		0xc3, // 7c78 ret
	}
	if deaf {
		code[0x2c] = 0x00 // test ah, 0: never
	}
	disk := make([]byte, 1<<20)
	n := copy(disk, code)
	copy(disk[n:], Banner+"\r\n\x00")
	disk[510], disk[511] = 0x55, 0xaa // the BIOS boots only with this mark
	return disk
}
