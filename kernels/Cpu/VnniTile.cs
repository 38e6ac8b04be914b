using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Rollout.Kernels;

/// <summary>
/// The int8 tile in AVX512-VNNI, which multiplies and adds 64 bytes an instruction, four times what fp32 does. .NET 10 has no intrinsic for it in
/// 512 bits, so the tile is assembled at start, one function for each number of rows; the instructions below are the whole kernel.
/// </summary>
internal sealed unsafe partial class VnniTile : IDisposable
{
    private const int LineBytes = PanelLayout.Width * Int8Layout.Group;

    /// <summary>Bytes that the weights are asked for ahead of themselves: further than the hardware looks, and on into the next panel.</summary>
    private const int Ahead = 4096;

    private const int ReadWrite = 3;         // PROT_READ | PROT_WRITE
    private const int ReadExecute = 5;       // PROT_READ | PROT_EXEC
    private const int PrivateAnonymous = 34; // MAP_PRIVATE | MAP_ANONYMOUS
    private static readonly nint s_mapFailed = -1;

    private static readonly AssemblerRegisterZMM[] s_zmm =
    [
        zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15,
        zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30, zmm31,
    ];

    private readonly nint[] _functions;
    private readonly nuint _size;
    private nint _memory;

    public VnniTile(int tallest)
    {
        byte[][] code = [.. Enumerable.Range(1, tallest).Select(Assemble)];
        _size = (nuint)code.Sum(function => (function.Length + 63) / 64 * 64);
        _memory = Map(0, _size, ReadWrite, PrivateAnonymous, -1, 0);
        if (_memory == s_mapFailed)
            throw new OutOfMemoryException($"{_size} bytes for machine code could not be mapped.");
        _functions = new nint[tallest + 1];
        nint at = _memory;
        for (int rows = 1; rows <= tallest; rows++)
        {
            _functions[rows] = at;
            Marshal.Copy(code[rows - 1], 0, at, code[rows - 1].Length);
            at += (code[rows - 1].Length + 63) / 64 * 64;
        }

        if (Protect(_memory, _size, ReadExecute) != 0)
        {
            int error = Marshal.GetLastPInvokeError();
            Dispose();
            throw new InvalidOperationException(
                $"int8 weights: this machine does not let a process make memory executable (mprotect: {Marshal.GetPInvokeErrorMessage(error)}).");
        }
    }

    /// <summary>The processor has the instruction, the system keeps its registers, and the calling convention is the one assembled for.</summary>
    public static bool IsSupported { get; } =
        OperatingSystem.IsLinux() && X86Base.X64.IsSupported && Avx512F.IsSupported && (X86Base.CpuId(7, 0).Ecx & (1 << 11)) != 0;

    public void Run(int height, ref Int8TileArguments arguments)
    {
        fixed (Int8TileArguments* a = &arguments)
            ((delegate* unmanaged<Int8TileArguments*, void>)_functions[height])(a);
    }

    public void Dispose()
    {
        if (_memory == 0)
            return;
        _ = Unmap(_memory, _size);
        _memory = 0;
    }

    private static byte[] Assemble(int rows)
    {
        Assembler c = new(64);
        Label nextBlock = c.CreateLabel(), nextGroup = c.CreateLabel();
        AssemblerRegisterZMM low = zmm31, high = zmm30, broadcast = zmm29;
        AssemblerRegister64 activations = rsi, panel = rdx, corrections = rcx, scales = r8, sums = r9, blocks = r10, groups = r11;

        c.mov(activations, Field(nameof(Int8TileArguments.Activations)));
        c.mov(panel, Field(nameof(Int8TileArguments.Panel)));
        c.mov(corrections, Field(nameof(Int8TileArguments.Corrections)));
        c.mov(scales, Field(nameof(Int8TileArguments.Scales)));
        c.mov(sums, Field(nameof(Int8TileArguments.Sums)));
        c.mov(blocks, Field(nameof(Int8TileArguments.Blocks)));

        c.Label(ref nextBlock);
        c.mov(groups, Field(nameof(Int8TileArguments.GroupsPerBlock)));
        for (int r = 0; r < rows; r++)
        {
            c.vpbroadcastd(s_zmm[2 * r], __dword_ptr[corrections + (4 * r)]);
            c.vmovdqa64(s_zmm[(2 * r) + 1], s_zmm[2 * r]);
        }

        c.Label(ref nextGroup);
        c.vmovdqu64(low, __zmmword_ptr[panel]);
        c.vmovdqu64(high, __zmmword_ptr[panel + 64]);
        c.prefetcht0(__byte_ptr[panel + Ahead]);
        c.prefetcht0(__byte_ptr[panel + (Ahead + 64)]);
        for (int r = 0; r < rows; r++)
        {
            c.vpbroadcastd(broadcast, __dword_ptr[activations + (Int8Layout.Group * r)]);
            c.vpdpbusd(s_zmm[2 * r], low, broadcast);
            c.vpdpbusd(s_zmm[(2 * r) + 1], high, broadcast);
        }

        c.add(panel, LineBytes);
        c.add(activations, Int8Layout.Group * rows);
        c.dec(groups);
        c.jne(nextGroup);

        for (int r = 0; r < rows; r++)
        {
            for (int half = 0; half < 2; half++)
            {
                int at = (r * PanelLayout.Width * sizeof(float)) + (half * 64);
                c.vcvtdq2ps(s_zmm[(2 * r) + half], s_zmm[(2 * r) + half]);
                c.vmovups(broadcast, __zmmword_ptr[sums + at]);
                c.vfmadd231ps(broadcast, s_zmm[(2 * r) + half], __dword_bcst[scales + (4 * r)]);
                c.vmovups(__zmmword_ptr[sums + at], broadcast);
            }
        }

        c.add(corrections, 4 * rows);
        c.add(scales, 4 * rows);
        c.dec(blocks);
        c.jne(nextBlock);
        c.vzeroupper();
        c.ret();

        using MemoryStream code = new();
        c.Assemble(new StreamCodeWriter(code), rip: 0);
        return code.ToArray();

        // rdi: the first argument.
        static AssemblerMemoryOperand Field(string name) => __qword_ptr[rdi + (int)Marshal.OffsetOf<Int8TileArguments>(name)];
    }

    [LibraryImport("libc", EntryPoint = "mmap")]
    private static partial nint Map(nint address, nuint length, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "mprotect", SetLastError = true)]
    private static partial int Protect(nint address, nuint length, int protection);

    [LibraryImport("libc", EntryPoint = "munmap")]
    private static partial int Unmap(nint address, nuint length);
}
