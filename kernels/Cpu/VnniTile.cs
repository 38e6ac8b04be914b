using System.Runtime.InteropServices;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;
using static Iced.Intel.AssemblerRegisters;

namespace Rollout.Kernels;

/// <summary>
/// The int8 tile in AVX512-VNNI, which multiplies and adds 64 bytes an instruction, four times what fp32 does. The instructions below are
/// the whole kernel.
/// </summary>
internal static class VnniTile
{
    /// <summary>Bytes by which weights are prefetched: further than the hardware does, and on into the next panel.</summary>
    private const int Ahead = 4096;

    /// <summary>AVX512-VNNI: leaf 7, ECX bit 11.</summary>
    public static bool IsSupported { get; } = MachineCode.IsSupported && (X86Base.CpuId(7, 0).Ecx & (1 << 11)) != 0;

    public static byte[] Assemble(int rows)
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
            c.vpbroadcastd(PairTileCode.Zmm(2 * r), __dword_ptr[corrections + (4 * r)]);
            c.vmovdqa64(PairTileCode.Zmm((2 * r) + 1), PairTileCode.Zmm(2 * r));
        }

        c.Label(ref nextGroup);
        c.vmovdqu64(low, __zmmword_ptr[panel]);
        c.vmovdqu64(high, __zmmword_ptr[panel + 64]);
        c.prefetcht0(__byte_ptr[panel + Ahead]);
        c.prefetcht0(__byte_ptr[panel + (Ahead + 64)]);
        for (int r = 0; r < rows; r++)
        {
            c.vpbroadcastd(broadcast, __dword_ptr[activations + (Int8Layout.Group * r)]);
            c.vpdpbusd(PairTileCode.Zmm(2 * r), low, broadcast);
            c.vpdpbusd(PairTileCode.Zmm((2 * r) + 1), high, broadcast);
        }

        c.add(panel, LanePanels.LineBytes);
        c.add(activations, Int8Layout.Group * rows);
        c.dec(groups);
        c.jne(nextGroup);

        for (int r = 0; r < rows; r++)
        {
            for (int half = 0; half < 2; half++)
            {
                int at = (r * PanelLayout.Width * sizeof(float)) + (half * 64);
                c.vcvtdq2ps(PairTileCode.Zmm((2 * r) + half), PairTileCode.Zmm((2 * r) + half));
                c.vmovups(broadcast, __zmmword_ptr[sums + at]);
                c.vfmadd231ps(broadcast, PairTileCode.Zmm((2 * r) + half), __dword_bcst[scales + (4 * r)]);
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

        static AssemblerMemoryOperand Field(string name) => __qword_ptr[rdi + (int)Marshal.OffsetOf<Int8TileArguments>(name)];
    }
}
