using System.CommandLine;
using Rollout.Gpu;
using Rollout.Kernels;

// Started by run.sh; a stage starts this program again for each of its parts.
Dictionary<int, IReadOnlyList<Part>> stages = new()
{
    [1] = Machine.Parts,
    [2] = Correctness.Parts,
    [3] = Survey.Parts,
    [4] = Rates.Parts,
    [5] = Updates.Parts,
    [6] = Peers.Parts,
};
Option<string> output = new("--out") { Description = "Folder for rows, logs and the report.", Required = true };
Argument<int> number = new("stage") { Description = "1 to 6." };
number.Validators.Add(result =>
{
    if (!stages.ContainsKey(result.GetValueOrDefault<int>())) result.AddError("stage: 1 to 6");
});
Argument<string> name = new("part") { Description = "One of the stage's." };

Command all = new("stage", "Runs the parts of a stage, each in a process of its own.") { number, output };
all.SetAction((arguments, _) =>
{
    int at = arguments.GetValue(number);
    return Stage.RunAllAsync(at, arguments.GetValue(output)!, stages[at]);
});
Command part = new("part", "Runs one part in this process.") { number, name, output };
part.SetAction((arguments, _) =>
{
    int at = arguments.GetValue(number);
    return Stage.Open(at, arguments.GetValue(output)!).RunAsync(stages[at].Single(part => part.Name == arguments.GetValue(name)));
});
Argument<string> format = new("format");
Argument<int> headDim = new("head");
Command compile = new("compile", "Compiles kernels: part of stage 1.") { number, format, headDim, output };
compile.SetAction(arguments =>
{
    Stage stage = Stage.Open(arguments.GetValue(number), arguments.GetValue(output)!);
    Machine.Compile(stage, WeightFormats.Parse(arguments.GetValue(format)!), arguments.GetValue(headDim));
});
Command small = new("small", "Runs a small model in both formats, for a checker.");
small.SetAction((_, _) => Correctness.SmallAsync());
Command share = new("share", "Shares device memory with the process that started this: stage 5 without PyTorch.");
share.SetAction(_ => Updates.Share());
Command report = new("report", "Prints the tables of the rows so far, and writes them to results.md.") { output };
report.SetAction(arguments => Console.Write(Report.Write(arguments.GetValue(output)!)));
RootCommand root = new("Tests and measures the CUDA backend on this machine.") { all, part, compile, small, share, report };
return await root.Parse(args).InvokeAsync();
