using System.Globalization;
using System.Text.RegularExpressions;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>One kernel's machine code: the resources it uses of a multiprocessor, and its loops.</summary>
/// <param name="Name">As its source has it.</param>
/// <param name="Registers">Of a thread.</param>
/// <param name="StackBytes">Of a thread, in device memory.</param>
/// <param name="SharedBytes">Of a block, without the launch's dynamic shared memory.</param>
/// <param name="SpillStores">Instructions that write to local memory.</param>
/// <param name="SpillLoads">Instructions that read from it.</param>
/// <param name="Instructions">All of its code, up to the jump to itself that ends it.</param>
/// <param name="Loops">By address.</param>
internal sealed record MachineCode(
    string Name, int Registers, int StackBytes, int SharedBytes, int SpillStores, int SpillLoads, int Instructions,
    IReadOnlyList<MachineLoop> Loops)
{
    /// <summary>The kernels of a cubin, from cuobjdump, which calls nvdisasm.</summary>
    public static async Task<MachineCode[]> Read(byte[] cubin)
    {
        string tool = Path.Combine(NvidiaFiles.Require("bin/cuobjdump", "bin/nvdisasm"), "bin", "cuobjdump"), file = Path.GetTempFileName();
        try
        {
            await File.WriteAllBytesAsync(file, cubin);
            return Parse(await ProgramOutput.Of(tool, "-res-usage", "-sass", file));
        }
        finally
        {
            File.Delete(file);
        }
    }

    private static MachineCode[] Parse(string output)
    {
        // " Function attend:", "  REG:118 STACK:0 SHARED:0 ...", for each; then "Function : attend" and its instructions, for each.
        Dictionary<string, int[]> resources = [];
        List<MachineCode> kernels = [];
        string[] lines = output.Split('\n');
        for (int i = 0; i < lines.Length; i++)
        {
            string line = lines[i].Trim();
            if (line.StartsWith("Function ", StringComparison.Ordinal) && line.EndsWith(':'))
            {
                Dictionary<string, string> numbers =
                    lines[++i].Trim().Split(' ').Select(pair => pair.Split(':')).ToDictionary(pair => pair[0], pair => pair[1]);
                resources[line["Function ".Length..^1]] =
                    [.. ((string[])["REG", "STACK", "SHARED"]).Select(name => int.Parse(numbers[name], CultureInfo.InvariantCulture))];
            }
            else if (line.StartsWith("Function : ", StringComparison.Ordinal))
            {
                string name = line["Function : ".Length..];
                List<Instruction> code = [];
                for (i++; i < lines.Length && !lines[i].TrimStart().StartsWith("Function : ", StringComparison.Ordinal); i++)
                {
                    if (Instruction.Parse(lines[i]) is { } instruction)
                        code.Add(instruction);
                }

                i--;
                int end = code.FindIndex(instruction => instruction.Target == instruction.Address);
                Instruction[] run = end < 0 ? [.. code] : [.. code.Take(end)]; // the rest only pads the last cache line
                int stores = run.Count(instruction => instruction.Is("STL")), loads = run.Count(instruction => instruction.Is("LDL"));
                int[] uses = resources[name];
                kernels.Add(new MachineCode(name, uses[0], uses[1], uses[2], stores, loads, run.Length, MachineLoop.Find(run)));
            }
        }

        Assert.NotEmpty(kernels);
        return [.. kernels];
    }
}

/// <summary>One instruction of SASS. Branches have a target.</summary>
internal sealed partial record Instruction(int Address, string Operation, bool IsConditional, int? Target)
{
    // "   /*04a0*/              @!P0 BRA 0x960 ;"
    [GeneratedRegex(@"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")]
    private static partial Regex Line();

    public static Instruction? Parse(string line)
    {
        Match match = Line().Match(line);
        if (!match.Success)
            return null;
        (string operation, string operands) = (match.Groups[3].Value, match.Groups[4].Value.Trim());
        string last = operands.Split(' ', ',')[^1], kind = operation.Split('.')[0];
        bool jumps = kind is "BRA" or "CALL" or "JMP" && last.StartsWith("0x", StringComparison.Ordinal);
        // A predicate before it or among its operands; a call comes back.
        bool conditional = match.Groups[2].Success || operands != last || kind == "CALL";
        return new Instruction(Hexadecimal(match.Groups[1].Value), operation, conditional, jumps ? Hexadecimal(last[2..]) : null);
    }

    private static int Hexadecimal(string digits) => int.Parse(digits, NumberStyles.HexNumber, CultureInfo.InvariantCulture);

    public bool Is(string operation) => Operation == operation || Operation.StartsWith($"{operation}.", StringComparison.Ordinal);

    /// <summary>Whether the next one may run after it.</summary>
    public bool FallsThrough =>
        IsConditional || (Target is null && Operation.Split('.')[0] is not ("EXIT" or "RET" or "BRA" or "BRX" or "JMX" or "KILL"));
}
