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
 *   s  prints the sum of its initrd's 32-bit words, which it inverts in memory and reads again, and powers off
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
        .set    START_INFO_MODLIST, 16
        .set    START_INFO_CMDLINE, 24
        .set    MODULE_ADDRESS, 0
        .set    MODULE_SIZE, 8

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
        cmp     $'s', %al
        je      sum

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

        /* EAX = the sum; 0 when a word does not read back as it was written. */
sum:    mov     START_INFO_MODLIST(%ebx), %edi
        mov     MODULE_ADDRESS(%edi), %esi
        mov     MODULE_SIZE(%edi), %ecx
        shr     $2, %ecx
        xor     %eax, %eax
1:      mov     (%esi), %ebx
        add     %ebx, %eax
        not     %ebx
        mov     %ebx, (%esi)
        cmp     (%esi), %ebx
        jne     2f
        add     $4, %esi
        dec     %ecx
        jnz     1b
        jmp     3f
2:      xor     %eax, %eax
        /* In hexadecimal, the highest digit first. */
3:      mov     %eax, %ebx
        mov     $8, %ecx
        mov     $COM1, %edx
4:      rol     $4, %ebx
        mov     %bl, %al
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     5f
        add     $('a' - '9' - 1), %al
5:      out     %al, %dx
        dec     %ecx
        jnz     4b
        jmp     off

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
