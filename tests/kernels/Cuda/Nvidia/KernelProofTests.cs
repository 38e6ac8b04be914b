using System.Globalization;
using System.Runtime.CompilerServices;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// The code that NVIDIA's compiler generates for every kernel, compared with kernels.tsv beside this file, a line a kernel. Registers,
/// shared memory and instructions, in total and of every loop, may not grow; stack and spills must equal the table's. In bf16 a kernel has
/// none, whatever the table says. With ROLLOUT_TEST_KERNEL_TABLE=write the tests write the table before they read it.
/// </summary>
public sealed class KernelProofTests
{
    private const string Head = "target\tkernel\tregisters\tstack\tspill stores\tspill loads\tshared\tinstructions\tloops";

    private static readonly string[] s_exact = ["stack", "spill stores", "spill loads"];
    private static readonly Lock s_writing = new();

    private static bool Writes => Environment.GetEnvironmentVariable("ROLLOUT_TEST_KERNEL_TABLE") == "write";

    public static TheoryData<string, bool> Targets => new()
    {
        { "sm_80", false }, { "sm_80", true }, { "sm_90a", false }, { "sm_90a", true }, { "sm_100", false }, { "sm_100", true },
    };

    [Theory, MemberData(nameof(Targets))]
    public async Task Kernels_need_no_more_than_the_table_says(string architecture, bool fp32)
    {
        string target = $"{architecture} {(fp32 ? "fp32" : "bf16")}";
        SortedDictionary<string, MachineCode> kernels = new(StringComparer.Ordinal);
        CompiledKernels compiled = await CompiledKernels.Of(architecture, fp32);
        foreach ((string file, byte[] cubin) in compiled.Code)
        {
            foreach (MachineCode kernel in await MachineCode.Read(cubin))
                kernels.Add(file.Split(' ', 2) is [_, var definitions] ? $"{kernel.Name} {definitions}" : kernel.Name, kernel);
        }

        List<string> wrong = [];
        foreach ((string name, MachineCode kernel) in kernels.Where(_ => !fp32))
        {
            (int stack, int stores, int loads) = (kernel.StackBytes, kernel.SpillStores, kernel.SpillLoads);
            if (stack + stores + loads > 0)
                wrong.Add($"{name}: {stack} bytes of stack, {stores} spill stores, {loads} spill loads");
        }

        Assert.True(wrong.Count == 0, $"{target} has spills or a stack:\n{string.Join('\n', wrong)}");
        string compiler = $"# NVRTC {compiled.Version}. ";
        if (Writes)
            Write(compiler, target, kernels);
        bool isOfTable = File.ReadLines(Table()).First().StartsWith(compiler, StringComparison.Ordinal);
        Assert.SkipUnless(isOfTable, $"the table is not of NVRTC {compiled.Version}, whose counts differ");
        Dictionary<string, string[]> table = Lines().Where(line => line[0] == target).ToDictionary(line => line[1]);
        foreach (string name in kernels.Keys.Union(table.Keys))
        {
            if (!table.TryGetValue(name, out string[]? line))
                wrong.Add($"{name} is not in the table");
            else if (!kernels.TryGetValue(name, out MachineCode? kernel))
                wrong.Add($"{name} is in the table only");
            else
                wrong.AddRange(Grown(line, Line(target, name, kernel)).Select(what => $"{name}: {what}"));
        }

        const string Hint = "ROLLOUT_TEST_KERNEL_TABLE=write writes it anew";
        Assert.True(wrong.Count == 0, $"{target} is not as kernels.tsv says ({Hint}):\n{string.Join('\n', wrong)}");
    }

    /// <summary>
    /// A listing as cuobjdump writes it: a loop within a loop, and a branch back from code out of line that is not a loop.
    /// </summary>
    [Fact]
    public void Loops_are_found_with_the_loops_within_them()
    {
        Instruction[] code =
        [
            .. """
                /*0000*/                   MOV R1, R2 ;
                /*0010*/               @P0 BRA 0x80 ;
                /*0020*/                   LDS R3, [R4] ;
                /*0030*/                   IADD3 R3, R3, R4, RZ ;
                /*0040*/               @P1 BRA 0x30 ;
                /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
                /*0060*/                   BRA P2, 0x20 ;
                /*0070*/                   EXIT ;
                /*0080*/                   MUFU.RCP R3, R3 ;
                /*0090*/                   BRA 0x70 ;
                /*00a0*/                   BRA 0xa0;
                """.Split('\n').Select(Instruction.Parse).OfType<Instruction>(),
        ];
        Assert.Equal(11, code.Length);
        Assert.Equal(["1:5+(LDS 1 BAR 1)", "2:2"], MachineLoop.Find(code[..^1]).Select(loop => $"{loop}"));
    }

    private static IEnumerable<string> Grown(string[] line, string[] now)
    {
        string[] names = Head.Split('\t');
        for (int i = 2; i < names.Length - 1; i++)
        {
            int difference = int.Parse(now[i], CultureInfo.InvariantCulture) - int.Parse(line[i], CultureInfo.InvariantCulture);
            if (s_exact.Contains(names[i]) ? difference != 0 : difference > 0)
                yield return $"{names[i]} {line[i]} -> {now[i]}";
        }

        string[] before = line[^1].Split(", "), after = now[^1].Split(", ");
        if (before.Length != after.Length)
        {
            yield return $"{before.Length} loops, {line[^1]} -> {after.Length}, {now[^1]}";
            yield break;
        }

        foreach ((string old, string loop) in before.Zip(after).Where(pair => Size(pair.Second) > Size(pair.First)))
            yield return $"loop {old} -> {loop}";

        // "2:57(LDGSTS 1)": 57 instructions; "" where there is no loop.
        static int Size(string loop) => loop == "" ? 0 : int.Parse(loop.Split(':')[1].Split('(', '+')[0], CultureInfo.InvariantCulture);
    }

    private static string[] Line(string target, string name, MachineCode kernel) =>
    [
        target, name,
        .. ((int[])[kernel.Registers, kernel.StackBytes, kernel.SpillStores, kernel.SpillLoads, kernel.SharedBytes, kernel.Instructions])
            .Select(number => number.ToString(CultureInfo.InvariantCulture)),
        string.Join(", ", kernel.Loops),
    ];

    private static void Write(string compiler, string target, IReadOnlyDictionary<string, MachineCode> kernels)
    {
        lock (s_writing)
        {
            string[] lines =
            [
                .. Lines().Where(line => line[0] != target).Concat(kernels.Select(kernel => Line(target, kernel.Key, kernel.Value)))
                    .Select(line => string.Join('\t', line)).Order(StringComparer.Ordinal),
            ];
            const string Loops = "Loops by address, as depth:instructions(operations); + where others are within, which are counted too.";
            File.WriteAllLines(Table(), [compiler + Loops, Head, .. lines]);
        }
    }

    private static IEnumerable<string[]> Lines() =>
        File.Exists(Table()) ? File.ReadAllLines(Table()).Skip(2).Select(line => line.Split('\t')) : [];

    private static string Table([CallerFilePath] string here = "") => Path.Combine(Path.GetDirectoryName(here)!, "kernels.tsv");
}
