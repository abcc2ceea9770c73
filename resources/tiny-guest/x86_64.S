/*
 * The tiny guest: the smallest thing that shows a virtual machine at work. `cowhand doctor` runs it on the host's KVM, and
 * tests and measurements boot it with `cowhand run --kernel resources/tiny-guest/x86_64.elf --cmdline WHAT`.
 *
 * Entered by the PVH protocol: 32-bit protected mode, no paging, EBX = hvm_start_info. It has no stack. The first letter of
 * the command line says what it does:
 *   i  prints "idle" and halts for ever           r  resets by ACPI's reset register
 *   t  triple faults                              p  reports a panic to the pvpanic device
 *   k  prints what a panicking Linux prints,      e  echoes what is typed, until q
 *      and halts for ever                         K  prints the panic's first line only, and resets
 *   anything else: prints "hello" and powers off
 *
 * resources/tiny-guest/build makes x86_64.elf of this; a test holds the two together.
 */
        .set    COM1, 0x3f8
        .set    COM1_STATUS, 0x3fd
        .set    PVPANIC, 0x505
        .set    ACPI_SLEEP_CONTROL, 0x600
        .set    ACPI_RESET, 0x602
        .set    SLEEP_S5, (5 << 2) | (1 << 5)
        .set    START_INFO_CMDLINE, 24

        /* XEN_ELFNOTE_PHYS32_ENTRY */
        .section .note.pvh, "a", @note
        .align  4
        .long   4, 4, 18
        .asciz  "Xen"
        .long   start

        .text
        .code32
        .globl  start
start:  mov     START_INFO_CMDLINE(%ebx), %edi
        mov     (%edi), %al
        cmp     $'i', %al
        je      idle
        cmp     $'r', %al
        je      reset
        cmp     $'t', %al
        je      triple
        cmp     $'p', %al
        je      panic
        cmp     $'k', %al
        je      dying
        cmp     $'K', %al
        je      dying_short
        cmp     $'e', %al
        je      echo

        mov     $hello, %esi
        mov     $off, %ebp
        jmp     print
off:    mov     $ACPI_SLEEP_CONTROL, %edx
        mov     $SLEEP_S5, %al
        out     %al, %dx
        jmp     halt

idle:   mov     $idling, %esi
        mov     $halt, %ebp
        jmp     print

dying:  mov     $last_words, %esi
        mov     $halt, %ebp
        jmp     print

dying_short:
        mov     $first_words, %esi
        mov     $reset, %ebp
        jmp     print

reset:  mov     $ACPI_RESET, %edx
        mov     $1, %al
        out     %al, %dx
        jmp     halt

panic:  mov     $PVPANIC, %edx
        mov     $1, %al
        out     %al, %dx
        jmp     halt

triple: lidt    no_idt
        ud2

echo:   mov     $COM1_STATUS, %edx
        in      %dx, %al
        test    $1, %al
        jz      echo
        mov     $COM1, %edx
        in      %dx, %al
        cmp     $'q', %al
        je      off
        out     %al, %dx
        jmp     echo

        /* Prints the text at ESI, then goes on at EBP. */
print:  mov     $COM1, %edx
1:      mov     (%esi), %al
        test    %al, %al
        jz      2f
        out     %al, %dx
        inc     %esi
        jmp     1b
2:      jmp     *%ebp

halt:   cli
        hlt
        jmp     halt

no_idt: .word   0
        .long   0
hello:  .asciz  "hello from the tiny guest\r\n"
idling: .asciz  "idle\r\n"
last_words:
        .ascii  "Kernel panic - not syncing: the tiny guest was told to\r\n"
        .asciz  "---[ end Kernel panic - not syncing: the tiny guest was told to ]---\r\n"
first_words:
        .asciz  "Kernel panic - not syncing: the tiny guest was told to\r\n"
